"""The GGUF file is the model: read back to the bit, and run by llama.cpp with the same ids and the same text."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import FORMS, randomised, small_tokenizer
from harness import complains
from llama import Llama, llama

from prepare.tokens import vocabulary
from shards import CorruptError, Tokenizer
from train.export.check import TEXTS
from train.export.gguf_file import check, write
from train.model.gpt import Model

KINDS = ("f32", "f16", "bf16", "q8_0")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return small_tokenizer()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_it_is_read_back_to_the_bit(form: str, kind: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = randomised(form, tokenizer.vocab_size)
    path = tmp_path / "x.gguf"
    write(model, tokenizer, kind, "x", path)
    assert check(path, model, tokenizer, kind) >= 35
    least = {"f32": 4, "f16": 2, "bf16": 2, "q8_0": 1}[kind] * model.parameter_count()
    assert least < path.stat().st_size < 1.4 * least + 60_000
    data = np.memmap(path, np.uint8, "r+")  # one bit of the last tensor, before what pads the file
    (last,) = np.flatnonzero(data)[-1:]
    data[last] ^= 1
    data.flush()
    with complains(CorruptError, str(path)):
        check(path, model, tokenizer, kind)


def test_another_vocabulary_is_found(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = randomised("modern", tokenizer.vocab_size)
    write(model, tokenizer, "f32", "x", tmp_path / "x.gguf")
    other = Tokenizer(tokenizer.name, [*tokenizer.tokens[:-2], *tokenizer.tokens[:-3:-1]])
    with complains(CorruptError, "tokenizer.ggml.tokens"):
        check(tmp_path / "x.gguf", model, other, "f32")


@pytest.fixture
def running(request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path: Path) -> Iterator[tuple[Model, Llama]]:
    pytest.importorskip("xllamacpp")
    model = randomised(request.param, tokenizer.vocab_size)
    write(model, tokenizer, "f32", "x", tmp_path / "x.gguf")
    with llama(tmp_path / "x.gguf", model.config.seq_len) as server:
        yield model, server


@pytest.mark.parametrize("running", FORMS, indirect=True)
def test_llama_cpp_continues_as_we_do(running: tuple[Model, Llama], tokenizer: Tokenizer) -> None:
    model, server = running
    ids = [tokenizer.eot, *tokenizer.encode("In this")]
    ours = list(ids)
    with torch.no_grad():
        for _ in range(32):
            ours.append(int(model(torch.tensor([ours]))[0, -1].argmax()))
    assert server.greedy(ids, 32) == ours[len(ids) :]
    for text in TEXTS:
        assert server.encode(text) == tokenizer.encode(text), text
    assert server.encode("In this", special=True) == ids  # it puts end-of-text before a prompt by itself


@pytest.mark.slow
def test_gpt2s_own_tokenizer(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    gpt2 = vocabulary.gpt2()
    model = randomised("modern-tied", gpt2.vocab_size)
    write(model, gpt2, "q8_0", "x", tmp_path / "x.gguf")
    with llama(tmp_path / "x.gguf", model.config.seq_len) as server:
        for text in TEXTS:
            assert server.encode(text) == gpt2.encode(text), text
