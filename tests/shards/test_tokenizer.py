"""Two tokenizer files, three libraries, one set of ids."""

import hashlib
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
from harness import complains
from tiktoken_ext.openai_public import r50k_pat_str

from prepare.text.documents import TextBatch, clean
from prepare.tokens import vocabulary
from prepare.tokens.encode import FastokensEngine, TiktokenEngine
from shards import CorruptError, RefusedError, Tokenizer

NASTY = [
    "plain text, it's 3 o'clock\n\n\n  two  spaces\t",
    "emoji 👩‍👩‍👧‍👦 and 🏳️‍🌈, CJK 漢字かな交じり文, देवनागरी, e\u0301 combining, \u00a0\u3000",
    "NUL \x00 in the middle\r\nCRLF\r\n",
    "a literal <|endoftext|> is text",
    "a" * 5000,
    " " * 5000,
    "\n" * 500,
    "",
]


@pytest.fixture(scope="module", params=["gpt2", "bpe"])
def tokenizer(request: pytest.FixtureRequest, texts: list[str]) -> Tokenizer:
    if request.param == "gpt2":
        return vocabulary.gpt2()
    return vocabulary.train_bpe(batches(texts), 1000)


def batches(texts: list[str]) -> list[TextBatch]:
    return [clean((texts,))]


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(tokenizer.name)
    vocabulary.save(tokenizer, folder)
    return folder


def test_gpt2_is_gpt2() -> None:
    tokenizer = vocabulary.gpt2()
    assert (tokenizer.vocab_size, tokenizer.eot) == (50257, 50256)
    assert tokenizer.encode("Hello, world") == [15496, 11, 995]
    assert tokenizer.encoding.eot_token == 50256
    assert tokenizer.encoding._pat_str == r50k_pat_str


def test_all_libraries_agree(tokenizer: Tokenizer, folder: Path, texts: list[str]) -> None:
    documents = texts[:400] + NASTY
    right = [tokenizer.encode(text) for text in documents]
    huggingface = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert [encoding.ids for encoding in huggingface.encode_batch(documents)] == right
    for engine in (FastokensEngine(folder), TiktokenEngine(tokenizer)):
        ids, offsets = engine.encode(documents)
        found = [ids[a:b].tolist() for a, b in pairwise(offsets)]
        assert found == right
    assert max(max(ids, default=0) for ids in right) < tokenizer.eot


def test_decoding_gives_the_text_back(tokenizer: Tokenizer, texts: list[str]) -> None:
    for text in texts[:200] + NASTY:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert int(tokenizer.byte_lengths[ids].sum()) == len(text.encode())
    assert tokenizer.decode([tokenizer.eot]) == "<|endoftext|>"
    assert tokenizer.byte_lengths[tokenizer.eot] == 0


def test_the_files_load_again(tokenizer: Tokenizer, folder: Path) -> None:
    path = folder / "tokenizer.tiktoken"
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert Tokenizer.load(path, tokenizer.name, sha256).tokens == tokenizer.tokens


def test_gpt2_merges_are_openais(shared: Path) -> None:
    tokenizer = vocabulary.gpt2()
    lines = (shared / "gpt2" / "vocab.bpe").read_text("utf-8").splitlines()[1:]
    merges = json.loads(tokenizer.to_json())["model"]["merges"]
    assert merges == [line for line in lines if line]
    vocab = json.loads((shared / "gpt2" / "encoder.json").read_text())
    vocab.pop("<|endoftext|>")
    assert json.loads(tokenizer.to_json())["model"]["vocab"] == vocab


def test_training_is_deterministic(texts: list[str]) -> None:
    first, second = (vocabulary.train_bpe(batches(texts), 600).tokens for _ in range(2))
    assert first == second


def test_too_little_text_for_the_vocabulary() -> None:
    with complains(RefusedError, "5000"):
        vocabulary.train_bpe(batches(["hardly anything, hardly anything"]), 5000)
    with pytest.raises(RefusedError, match="there is no text to train a vocabulary on"):
        vocabulary.train_bpe(batches([""]), 5000)


def test_another_ranks_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.tiktoken"
    path.write_bytes(b"IQ== 0\n")
    with complains(CorruptError, "sha256", f"{'0' * 64}"):
        Tokenizer.load(path, "gpt2", "0" * 64)


def test_ranks_with_a_hole(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.tiktoken"
    path.write_bytes(b"IQ== 0\nIg== 2\n")
    with complains(CorruptError, "ranks"):
        Tokenizer.load(path, "x", hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.mark.parametrize(
    "data",
    [b"AA==\n", b"AA== 0 1\n", b"A 0\n", b"AA== x\n", b"AA== " + b"1" * 5000 + b"\n"],
    ids=["no rank", "two ranks", "no base64", "no number", "5,000 digits"],
)
def test_lines_that_are_no_ranks(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "tokenizer.tiktoken"
    path.write_bytes(data)
    with complains(CorruptError, "base64"):
        Tokenizer.load(path, "x", hashlib.sha256(data).hexdigest())


def test_a_ranks_file_too_large_to_be_one(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.tiktoken"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CorruptError, match="such a file has at most"):
        Tokenizer.load(path, "x", "0" * 64)


def test_one_thread_and_many_give_the_same_ids(folder: Path, texts: list[str]) -> None:
    """fastokens reads its number of threads once: another process has another."""
    code = (
        "import sys, fastokens, hashlib, json; t = fastokens.Tokenizer.from_file(sys.argv[1]);"
        "print(hashlib.sha256(t.encode_batch_flat(json.load(sys.stdin))[0]).hexdigest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code, str(folder / "tokenizer.json")],
            input=json.dumps([*texts, "long " * 200_000]),
            env={**os.environ, "FASTOKENS_BPE_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "2")
    }
    assert len(found) == 1
