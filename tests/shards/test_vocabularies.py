"""Other people's vocabularies become tokenizers of ours, or are refused with the reason."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from harness import complains

from prepare.text.documents import clean
from prepare.tokens import vocabulary
from shards import ConfigError, CorruptError, Tokenizer
from shards.tokenizer import EOT_TEXT

Json = dict[str, Any]
OUR_FORM = "millpond's tokenizers are byte-level BPEs that split text as GPT-2's does"


@pytest.fixture(scope="module")
def bpe(texts: list[str]) -> Tokenizer:
    return vocabulary.train_bpe([clean((texts,))], 600)


@pytest.fixture
def tokenizer_json(bpe: Tokenizer, tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(bpe.to_json())
    return path


@pytest.fixture
def vocab_json(bpe: Tokenizer, tmp_path: Path) -> Path:
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps({**json.loads(bpe.to_json())["model"]["vocab"], EOT_TEXT: bpe.eot}))
    return path


def test_our_own_tokenizer_comes_back(tokenizer_json: Path, bpe: Tokenizer) -> None:
    found = Tokenizer.from_vocab(tokenizer_json)
    assert (found.name, found.eot, found.vocab_size) == ("bpe-600", 599, 600)
    assert found.tokens == bpe.tokens
    assert found.to_json() == tokenizer_json.read_bytes()


def test_gpt2_is_known_by_its_ranks(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(vocabulary.gpt2().to_json())
    assert (Tokenizer.from_vocab(path).name, Tokenizer.from_vocab(path).tokens) == ("gpt2", vocabulary.gpt2().tokens)


def test_what_the_tokenizers_library_writes(tokenizer_json: Path, bpe: Tokenizer) -> None:
    """It writes merges as pairs, and end-of-text as an added token."""
    theirs = tokenizers.Tokenizer.from_file(str(tokenizer_json))
    theirs.add_special_tokens([EOT_TEXT])
    theirs.save(str(tokenizer_json))
    written = json.loads(tokenizer_json.read_text())
    assert isinstance(written["model"]["merges"][0], list)
    assert written["added_tokens"][0]["id"] == bpe.eot
    assert Tokenizer.from_vocab(tokenizer_json).tokens == bpe.tokens


def test_a_vocab_json_with_and_without_end_of_text(vocab_json: Path, bpe: Tokenizer) -> None:
    assert Tokenizer.from_vocab(vocab_json).tokens == bpe.tokens
    vocab = json.loads(vocab_json.read_text())
    del vocab[EOT_TEXT]
    vocab_json.write_text(json.dumps(dict(reversed(vocab.items()))))
    assert Tokenizer.from_vocab(vocab_json).tokens == bpe.tokens


def test_openais_encoder_json(shared: Path) -> None:
    found = Tokenizer.from_vocab(shared / "gpt2" / "encoder.json")
    assert (found.name, found.eot) == ("gpt2", 50256)
    assert found.tokens == vocabulary.gpt2().tokens


def test_megatrons_vocabulary(shared: Path) -> None:
    found = Tokenizer.from_vocab(shared / "oracles" / "megatron_gpt2-tiny-vocab.json")
    assert (found.name, found.eot) == ("bpe-5000", 4999)
    lines = (shared / "oracles" / "megatron_gpt2-tiny-merges.txt").read_text().splitlines()[1:]
    assert json.loads(found.to_json())["model"]["merges"] == [line for line in lines if line]


def swap_ids(vocab: dict[str, int], one: str, other: str) -> None:
    vocab[one], vocab[other] = vocab[other], vocab[one]


@pytest.mark.parametrize(
    ("change", "says", "why"),
    [
        (lambda v: v.pop("!"), "'\"' has id 1, expected 0", "ids are 0, 1, 2 and so on"),
        (lambda v: v.update({"#": 5}), "'$' has id 3, expected 2", "ids are 0, 1, 2 and so on"),
        (lambda v: v.update({"!": -1}), "'!' has id -1, expected 0", "ids are 0, 1, 2 and so on"),
        (lambda v: v.update({"!": 2**80}), "'\"' has id 1, expected 0", "ids are 0, 1, 2 and so on"),
        (lambda v: swap_ids(v, "!", EOT_TEXT), "<|endoftext|> has id 0, expected the last, 599", OUR_FORM),
        (lambda v: v.update({"▁the": 600}), "<|endoftext|> has id 599, expected the last, 600", OUR_FORM),
        (
            lambda v: (v.pop(EOT_TEXT), v.update({"▁the": 599})),
            "id 599, '▁the', is not spelled in GPT-2's characters for bytes",
            OUR_FORM,
        ),
        (
            lambda v: (v.pop(EOT_TEXT), v.update({"": 599})),
            "id 599, '', is not spelled in GPT-2's characters for bytes",
            OUR_FORM,
        ),
        (
            lambda v: (v.pop("!"), v.update({"!!": 0})),
            "1 of the 256 bytes have no id",
            f"text could not be encoded; {OUR_FORM}",
        ),
        (
            lambda v: (v.pop(EOT_TEXT), v.update({"@@@@@@": 599})),
            "tokenizer bpe-601: id 599 (b'@@@@@@') cannot be reached by merges",
            OUR_FORM,
        ),
    ],
)
def test_vocabularies_that_do_not_fit(
    change: Callable[[dict[str, int]], object], says: str, why: str, vocab_json: Path
) -> None:
    vocab = json.loads(vocab_json.read_text())
    change(vocab)
    vocab_json.write_text(json.dumps(vocab))
    with complains(ConfigError, f"{vocab_json}: {says}", why):
        Tokenizer.from_vocab(vocab_json)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t["model"].update({"type": "Unigram", "vocab": [["a", 0.5]]}), "its model is Unigram"),
        (lambda t: t["model"].update({"type": "WordPiece"}), "its model is WordPiece"),
        (lambda t: t.update({"pre_tokenizer": None}), "its pre_tokenizer is None, with another pattern than GPT-2's"),
        (
            lambda t: t.update({"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}}),
            "its pre_tokenizer is Sequence, with another pattern than GPT-2's",
        ),
        (
            lambda t: t["pre_tokenizer"].update({"use_regex": False}),
            "its pre_tokenizer is ByteLevel, with another pattern than GPT-2's",
        ),
        (
            lambda t: t["pre_tokenizer"].update({"add_prefix_space": True}),
            "its pre_tokenizer adds a space before the text",
        ),
        (
            lambda t: t.update({"normalizer": {"type": "NFC"}}),
            "its normalizer, NFC, changes text before it is encoded",
        ),
        (lambda t: t["model"].update({"end_of_word_suffix": "</w>"}), "its tokens are marked as parts of words"),
        (
            lambda t: t.update({"added_tokens": [{"id": 599, "content": "<|im_start|>"}]}),
            "it has 1 special tokens beside <|endoftext|>: <|im_start|>",
        ),
    ],
)
def test_tokenizers_of_another_form(change: Callable[[Json], object], says: str, tokenizer_json: Path) -> None:
    tokenizer = json.loads(tokenizer_json.read_text())
    change(tokenizer)
    tokenizer_json.write_text(json.dumps(tokenizer))
    with complains(ConfigError, f"{tokenizer_json}: {says}", OUR_FORM):
        Tokenizer.from_vocab(tokenizer_json)


@pytest.mark.parametrize("change", ["swap", "drop", "more"])
def test_merges_in_another_order_than_the_ids(change: str, tokenizer_json: Path) -> None:
    tokenizer = json.loads(tokenizer_json.read_text())
    merges = tokenizer["model"]["merges"]
    first, second = (tuple(merge.split()) for merge in merges[:2])
    if change == "swap":
        merges[0], merges[1] = merges[1], merges[0]
        says = f"merge 0 is {second}, and {first} in the order of its ids"
    elif change == "drop":
        says = f"merge 342 is None, and {tuple(merges.pop().split())} in the order of its ids"
    else:
        merges.append("q q")
        says = "merge 343 is ('q', 'q'), and None in the order of its ids"
    tokenizer_json.write_text(json.dumps(tokenizer))
    why = "millpond merges in that order, and would encode text to other ids than this tokenizer"
    with complains(ConfigError, f"{tokenizer_json}: {says}", why):
        Tokenizer.from_vocab(tokenizer_json)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"a": "b"}',
        '{"a": 1.5}',
        '{"model": {}}',
        '{"model": {"vocab": {"a": []}}}',
        "[" * 100_000,
        "\0",
    ],
)
def test_files_that_are_no_vocabulary(text: str, tmp_path: Path) -> None:
    path = tmp_path / "vocab.json"
    path.write_text(text)
    with pytest.raises(CorruptError, match=r"vocab\.json: not a valid (dict|TokenizerJson): "):
        Tokenizer.from_vocab(path)


def test_a_missing_vocabulary(tmp_path: Path) -> None:
    with complains(ConfigError, "vocab.json"):
        Tokenizer.from_vocab(tmp_path / "vocab.json")
