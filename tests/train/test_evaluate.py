"""The validation loss is the mean over fixed windows, and bits per byte counts the bytes of the text."""

import math
import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from shards import TokenFolder
from train.config import ModelConfig
from train.data.windows import FolderWindows
from train.evaluate import evaluate
from train.model.gpt import Model
from train.sample import Sampling, generate

CONFIG = ModelConfig(family="gpt2", n_layer=1, n_head=2, d_model=32, seq_len=32)


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model(CONFIG, 512)


def windows_of(folder: TokenFolder) -> FolderWindows:
    return FolderWindows.of(folder, "val", CONFIG.seq_len, 0, "sequential")


def test_against_one_window_at_a_time(tiny_folder: Path, model: Model) -> None:
    folder = TokenFolder(tiny_folder)
    windows, lengths = windows_of(folder), folder.tokenizer.byte_lengths
    stream = folder.stream("val")
    found = evaluate(model, windows, lengths, 32 * 50 + 31, 7, nullcontext)
    nats, nbytes = 0.0, 0
    for window in range(50):
        tokens = torch.from_numpy(stream.window(window * 32, 33).astype(np.int64))[None]
        with torch.no_grad():
            nats += 32 * model.loss(tokens[:, :-1], tokens[:, 1:]).item()
        nbytes += len(folder.tokenizer.decode(tokens[0, 1:].tolist()).replace("<|endoftext|>", "").encode("utf-8"))
    assert found.tokens == 1600
    assert found.loss == pytest.approx(nats / 1600, abs=1e-6)
    assert found.bpb == pytest.approx(nats / math.log(2) / nbytes, rel=2e-3)  # a cut character decodes to 3 bytes


def test_batch_size_does_not_matter(tiny_folder: Path, model: Model) -> None:
    folder = TokenFolder(tiny_folder)
    windows, lengths = windows_of(folder), folder.tokenizer.byte_lengths
    found = [evaluate(model, windows, lengths, 3200, size, nullcontext).loss for size in (1, 9, 100)]
    assert found == pytest.approx([found[0]] * 3, abs=1e-6)


def test_all_there_is(tiny_folder: Path, model: Model) -> None:
    folder = TokenFolder(tiny_folder)
    found = evaluate(model, windows_of(folder), folder.tokenizer.byte_lengths, 10**12, 64, nullcontext)
    assert found.tokens == (len(folder.stream("val")) - 1) // 32 * 32


def test_evaluating_and_sampling_leave_the_run_alone(tiny_folder: Path, model: Model) -> None:
    folder = TokenFolder(tiny_folder)
    before = torch.get_rng_state()
    evaluate(model, windows_of(folder), folder.tokenizer.byte_lengths, 320, 4, nullcontext)
    text = generate(model, folder.tokenizer, "The", 10)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert text.startswith("The")
    assert text == generate(model, folder.tokenizer, "The", 10)
    assert text != generate(model, folder.tokenizer, "The", 10, seed=1)
    assert generate(model, folder.tokenizer, "The", 5, Sampling(temperature=0)) == generate(
        model, folder.tokenizer, "The", 5, Sampling(temperature=0), seed=9
    )


def test_a_prompt_longer_than_the_context(tiny_folder: Path, model: Model) -> None:
    tokenizer = TokenFolder(tiny_folder).tokenizer
    prompt = "many words " * 40
    assert len(tokenizer.encode(prompt)) > 64
    assert generate(model, tokenizer, prompt, 3).startswith(prompt)


def test_memory_that_runs_out_is_met_with_smaller_batches(
    tiny_folder: Path, model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = TokenFolder(tiny_folder)
    windows, lengths = windows_of(folder), folder.tokenizer.byte_lengths
    expected = evaluate(model, windows, lengths, 3200, 9, nullcontext)
    whole, sizes = model.loss, []

    def loss(inputs: torch.Tensor, *rest: torch.Tensor | None) -> torch.Tensor:
        sizes.append(len(inputs))
        if len(inputs) > 30:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(inputs, *rest)

    monkeypatch.setattr(model, "loss", loss)
    found = evaluate(model, windows, lengths, 3200, 64, nullcontext)
    assert sizes == [64, 32, 16, 16, 16, 16, 16, 16, 4]
    assert (found.tokens, found.bpb) == (expected.tokens, pytest.approx(expected.bpb, rel=1e-6))
    assert found.loss == pytest.approx(expected.loss, abs=1e-6)
    assert re.search(r"evaluation: .*\b32\b.*\b16\b", caplog.text)
