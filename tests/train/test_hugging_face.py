"""What is exported is the model: transformers gives the same logits, the same ids and the same text."""

import json
from pathlib import Path

import pytest
import torch
from exported import FORMS, randomised, small_tokenizer
from harness import complains, stdlib_texts
from safetensors.torch import load_file, save_file

from prepare.tokens import vocabulary
from shards import CorruptError, Tokenizer
from train.export import check as checking
from train.export.check import TEXTS, check
from train.export.hugging_face import DTYPES, write
from train.sample import Sampling, generate


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_transformers_loads_the_same_model(form: str, dtype: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = randomised(form, tokenizer.vocab_size)
    write(model, tokenizer, DTYPES[dtype], tmp_path)
    found = check(tmp_path, model, tokenizer, DTYPES[dtype])
    assert found.max_logit_difference < 1e-4 and found.texts == len(TEXTS) >= 20
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < 1.1 * model.parameter_count() * DTYPES[dtype].itemsize + 20_000


def test_gpt2s_own_tokenizer(tmp_path: Path) -> None:
    gpt2 = vocabulary.gpt2()
    model = randomised("modern-tied", gpt2.vocab_size)
    write(model, gpt2, torch.float32, tmp_path)
    assert check(tmp_path, model, gpt2, torch.float32).max_logit_difference < 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_the_pipeline_continues_as_we_do(form: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import pipeline

    model = randomised(form, tokenizer.vocab_size)
    write(model, tokenizer, torch.float32, tmp_path)
    generator = pipeline("text-generation", str(tmp_path))
    prompt = "<|endoftext|>In this"  # what docs/getting-started.md shows
    found = generator(prompt, max_new_tokens=32, do_sample=False, return_full_text=True)[0]["generated_text"]
    assert found.removeprefix("<|endoftext|>") == generate(model, tokenizer, "In this", 32, Sampling(temperature=0))


def test_end_of_text_is_special_there_and_text_here(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write(randomised("modern", tokenizer.vocab_size), tokenizer, torch.float32, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode("a<|endoftext|>")[-1] == tokenizer.eot == theirs.eos_token_id
    assert tokenizer.eot not in tokenizer.encode("a<|endoftext|>")
    assert theirs.encode("a<|endoftext|>", split_special_tokens=True) == tokenizer.encode("a<|endoftext|>")
    assert theirs.decode([tokenizer.eot, *tokenizer.encode("a b")], skip_special_tokens=True) == "a b"


def test_both_majors_find_what_they_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """What transformers 4 reads and 5 does not write, and the reverse; llama.cpp's converter wants n_ctx."""
    write(randomised("modern", tokenizer.vocab_size), tokenizer, torch.bfloat16, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 50_000.0
    assert config["dtype"] == config["torch_dtype"] == "bfloat16" and config["head_dim"] == 16
    write(randomised("gpt2", tokenizer.vocab_size), tokenizer, torch.float32, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["n_ctx"] == config["n_positions"] == 96
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_another_model_or_tokenizer_is_found(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = randomised("gpt2", tokenizer.vocab_size)
    write(model, tokenizer, torch.float32, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["transformer.ln_f.bias"][3] += 0.01
    save_file(tensors, path, {"format": "pt"})
    with complains(CorruptError, str(tmp_path), "0.0001"):
        check(tmp_path, model, tokenizer, torch.float32)
    other = Tokenizer(tokenizer.name, [*tokenizer.tokens[:300], *tokenizer.tokens[301:], tokenizer.tokens[300]])
    monkeypatch.setattr(checking, "TEXTS", stdlib_texts()[:20])
    with complains(CorruptError, str(tmp_path), "encodes"):
        check(tmp_path, model, other, torch.float32)
