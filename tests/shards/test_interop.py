"""Other people's token files come in and go out again, to the last byte."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import xxhash
from foreign import EOT, folder_of, llmc, megatron, nanogpt, npy, read, record_of
from harness import complains
from hypothesis import given, settings
from hypothesis import strategies as st

from prepare.tokens import vocabulary
from shards import (
    CorruptError,
    TokenFolder,
    Tokenizer,
    verify,
)
from shards.interop import FORMATS, ForeignTokens, export, hash_documents, read_tokens

BYTES = Tokenizer("bytes", [bytes([i]) for i in range(256)])
BIG = 70_000
DOCUMENTS = st.lists(st.lists(st.integers(0, EOT - 1), max_size=20), min_size=1, max_size=8)


@settings(deadline=None, max_examples=60)
@given(
    parts=st.lists(DOCUMENTS, min_size=1, max_size=3), before=st.booleans(), vocab_size=st.sampled_from([EOT + 1, BIG])
)
def test_what_goes_out_is_what_others_write(
    parts: list[list[list[int]]], before: bool, vocab_size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("interop")
    dtype, code = (np.dtype("<u2"), 8) if vocab_size < 2**16 else (np.dtype("<u4"), 4)
    eot = vocab_size - 1
    written: list[tuple[ForeignTokens, None]] = []
    ended = [[[eot, *ids] if before else [*ids, eot] for ids in documents] for documents in parts]
    for i, documents in enumerate(ended):
        tokens = np.array([token for document in documents for token in document], dtype)
        sizes = [len(document) for document in documents]
        name = folder / f"{i}.bin"
        paths = [nanogpt(name, tokens), npy(name.with_suffix(".npy"), tokens), llmc(folder / f"{i}-llmc.bin", tokens)]
        paths.append(megatron(folder / f"{i}-megatron.bin", tokens, code, sizes, list(range(len(sizes) + 1))))
        for path in paths:
            found = read(path, vocab_size)
            assert found.tokens.dtype == dtype
            assert found.tokens.tolist() == tokens.tolist()
            if path == paths[3] or before or tokens[0] != eot:  # an empty first document hides where the mark stands
                assert found.starts.tolist() == np.cumsum([0, *sizes])[:-1].tolist()
            if tokens[0] != eot:
                assert found.placement == "after"
        written.append((found, None))
    ours = folder_of(folder / "ours", record_of(vocab_size), *written)
    whole = np.array([token for documents in ended for document in documents for token in document], dtype)
    sizes = [len(document) for documents in ended for document in documents]
    (folder / "expected").mkdir()
    nanogpt(folder / "expected" / "nanogpt.bin", whole)
    npy(folder / "expected" / "npy.npy", whole)
    megatron(folder / "expected" / "megatron.bin", whole, code, sizes, list(range(len(sizes) + 1)))
    for form in FORMATS:
        for path in export(ours, "train", form, folder / "out" / form):
            assert path.read_bytes() == (folder / "expected" / f"{form}{path.suffix}").read_bytes()


@pytest.mark.parametrize(
    ("ids", "starts", "placement"),
    [
        ([EOT, 1, 2, EOT, 3], [0, 3], "before"),
        ([1, 2, EOT, 3, EOT], [0, 3], "after"),
        ([1, 2, EOT, 3, EOT, 4], [0, 2, 4], "before"),
        ([1, 2, 3], [0], "before"),
        ([EOT, 1, EOT], [0, 2], "before"),
        ([EOT, EOT, 1, EOT, EOT, EOT, 2], [0, 1, 3, 4, 5], "before"),
        ([1, EOT, EOT, EOT, 2, EOT], [0, 2, 3, 4], "after"),
        ([EOT], [0], "before"),
        ([1], [0], "before"),
    ],
)
def test_where_documents_begin(ids: list[int], starts: list[int], placement: str, tmp_path: Path) -> None:
    for path in (nanogpt(tmp_path / "x.bin", np.array(ids, "<u2")), npy(tmp_path / "x.npy", np.array(ids, "<i4"))):
        found = read(path)
        assert (found.starts.tolist(), found.placement) == (starts, placement)
        assert found.starts.dtype == np.int64


@pytest.mark.parametrize("documents", [[[EOT, EOT, 1, EOT, EOT, 2]], [[1, EOT, EOT, 2, EOT]], [[EOT, 1], [EOT, 2]]])
def test_verify_finds_nothing_in_what_came_in(documents: list[list[int]], tmp_path: Path) -> None:
    found = [read(nanogpt(tmp_path / f"{i}.bin", np.array(ids, "<u2"))) for i, ids in enumerate(documents)]
    (tmp_path / "ours").mkdir()
    tokenizer = Tokenizer("x", [*BYTES.tokens, *(bytes([i, i]) for i in range(43))])
    folder_of(tmp_path / "ours", vocabulary.save(tokenizer, tmp_path / "ours"), *((one, None) for one in found))
    assert verify(tmp_path / "ours") == []


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<i4", "<i8"])
@pytest.mark.parametrize("vocab_size", [EOT + 1, BIG])
def test_every_width_of_numpy(dtype: str, vocab_size: int, tmp_path: Path) -> None:
    ids = [vocab_size - 1, 5, 6] if dtype != "<u2" else [5, 6]
    found = read(npy(tmp_path / "x.npy", np.array(ids).astype(dtype)), vocab_size)
    assert found.tokens.tolist() == ids
    assert found.tokens.dtype == ("<u2" if dtype == "<u2" else "<u4")
    assert not found.tokens.flags.writeable
    assert not found.tokens.flags.owndata


@pytest.mark.parametrize(("code", "dtype"), [(3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2")])
def test_every_width_of_megatron(code: int, dtype: str, tmp_path: Path) -> None:
    found = read(megatron(tmp_path / "x.bin", np.array([1, 2, EOT, 3, EOT], dtype), code, [3, 2], [0, 1, 2]))
    assert found.tokens.tolist() == [1, 2, EOT, 3, EOT]
    assert found.starts.tolist() == [0, 3]
    assert not found.tokens.flags.writeable


def test_megatron_documents_of_several_sequences(tmp_path: Path) -> None:
    tokens = np.array([1, 2, 3, EOT, 4, EOT], "<u2")
    found = read(megatron(tmp_path / "x.bin", tokens, 8, [2, 0, 2, 0, 2], [0, 3, 4, 5]))
    assert found.starts.tolist() == [0, 4]  # the second document has no token
    assert found.placement == "after"


def test_files_that_say_they_are_empty(tmp_path: Path) -> None:
    none = np.empty(0, "<u2")
    paths = [
        npy(tmp_path / "x.npy", none),
        llmc(tmp_path / "llmc.bin", none),
        megatron(tmp_path / "m.bin", none, 8, [], [0]),
    ]
    for path in paths:
        found = read(path)
        assert (len(found.tokens), len(found.starts)) == (0, 0)
        assert len(hash_documents(found, BYTES)) == 0


def test_our_own_shards_come_in(tiny_folder: Path, tmp_path: Path) -> None:
    folder = TokenFolder(tiny_folder)
    tokenizer = folder.tokenizer
    for shard in (*folder.shards("train"), *folder.shards("val")):
        found = read_tokens(shard.path, eot=tokenizer.eot, vocab_size=tokenizer.vocab_size)
        assert found.placement == "before"
        assert np.array_equal(found.starts, shard.documents["start"])
        assert np.array_equal(hash_documents(found, tokenizer), shard.documents["hash"])
    with complains(CorruptError, "vocabulary 512", "511", "513", "512"):
        read_tokens(tiny_folder / "train-00000.bin", eot=512, vocab_size=513)


def test_a_folder_goes_out_and_comes_in(tiny_folder: Path, tmp_path: Path) -> None:
    folder = TokenFolder(tiny_folder)
    for split in ("train", "val"):
        shards = folder.shards(split)
        for form in FORMATS:
            paths = export(folder, split, form, tmp_path / form)
            assert [path.name for path in paths] == {
                "nanogpt": [f"{split}.bin"],
                "npy": [f"{split}.npy"],
                "megatron": [f"{split}.bin", f"{split}.idx"],
            }[form]
            found = read_tokens(paths[0], eot=511, vocab_size=512)
            assert found.tokens.tolist() == np.concatenate([shard.tokens for shard in shards]).tolist()
            hashes = np.concatenate([shard.documents["hash"] for shard in shards])
            assert np.array_equal(hash_documents(found, folder.tokenizer), hashes)


def test_a_document_longer_than_a_block_is_hashed_whole(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 256, 600_001)
    ids[[100, 550_000]] = EOT
    found = read(nanogpt(tmp_path / "x.bin", ids.astype("<u2")))
    wide = Tokenizer("x", BYTES.tokens + [b"??"] * (EOT - 256))
    data = ids.astype(np.uint8).tobytes()
    expected = [data[:100], data[101:550_000], data[550_001:]]
    assert hash_documents(found, wide).tolist() == [xxhash.xxh3_64_intdigest(text) for text in expected]


# The real files of others


def test_nanogpt_oracle(shared: Path, tmp_path: Path) -> None:
    gpt2, oracles = vocabulary.gpt2(), shared / "oracles"
    theirs = {split: oracles / f"nanogpt_shakespeare_{split}.bin" for split in ("train", "val")}
    train, val = (read_tokens(path, eot=gpt2.eot, vocab_size=gpt2.vocab_size) for path in theirs.values())
    assert train.starts.tolist() == val.starts.tolist() == [0]
    text = (oracles / "tinyshakespeare_input.txt").read_text()
    assert gpt2.decode(train.tokens) + gpt2.decode(val.tokens) == text
    assert int(hash_documents(train, gpt2)[0]) == xxhash.xxh3_64_intdigest(text[: int(len(text) * 0.9)].encode())
    (tmp_path / "ours").mkdir()
    ours = folder_of(tmp_path / "ours", vocabulary.save(gpt2, tmp_path / "ours"), (train, val))
    for split in ("train", "val"):
        (path,) = export(ours, split, "nanogpt", tmp_path / "out")
        assert path.read_bytes() == theirs[split].read_bytes()


def test_llmc_oracle(shared: Path, tmp_path: Path) -> None:
    gpt2, oracles = vocabulary.gpt2(), shared / "oracles"
    theirs = {split: oracles / f"llmc_tiny_shakespeare_{split}.bin" for split in ("train", "val")}
    train, val = (read_tokens(path, eot=gpt2.eot, vocab_size=gpt2.vocab_size) for path in theirs.values())
    assert (val.placement, len(val.starts), len(train.starts)) == ("before", 809, 6414)  # train begins mid-document
    (tmp_path / "ours").mkdir()
    ours = folder_of(tmp_path / "ours", vocabulary.save(gpt2, tmp_path / "ours"), (train, val))
    texts: list[str] = []
    for split, found in (("val", val), ("train", train)):
        header = (ours.path / f"{split}-00000.bin").read_bytes()
        assert header[:12] == theirs[split].read_bytes()[:12]
        assert header[1024:] == theirs[split].read_bytes()[1024:]
        bounds = pairwise([*found.starts, len(found.tokens)])
        documents = [gpt2.decode(id for id in found.tokens[a:b] if id != gpt2.eot) for a, b in bounds]
        assert hash_documents(found, gpt2).tolist() == [xxhash.xxh3_64_intdigest(text.encode()) for text in documents]
        texts += documents
    assert "".join(texts) == (oracles / "tinyshakespeare_input.txt").read_text()


def test_megatron_oracle(shared: Path, tmp_path: Path) -> None:
    oracles = shared / "oracles"
    tokenizer = Tokenizer.from_vocab(oracles / "megatron_gpt2-tiny-vocab.json")
    theirs = oracles / "megatron_meg-gpt2-openwebtext_text_document.bin"
    found = read_tokens(theirs, eot=tokenizer.eot, vocab_size=tokenizer.vocab_size)
    assert (len(found.tokens), len(found.starts), found.placement) == (1_361_845, 1000, "after")
    assert np.all(found.tokens[np.append(found.starts[1:], len(found.tokens)) - 1] == tokenizer.eot)
    bounds = pairwise([*found.starts, len(found.tokens)])
    texts = [b"".join(tokenizer.tokens[id] for id in found.tokens[a : b - 1]).decode() for a, b in bounds]
    assert texts[0].startswith("A magazine supplement with an image of Adolf Hitler and the title")
    assert sum(" the " in text for text in texts) > 990
    assert hash_documents(found, tokenizer).tolist() == [xxhash.xxh3_64_intdigest(text.encode()) for text in texts]
    (tmp_path / "ours").mkdir()
    ours = folder_of(tmp_path / "ours", vocabulary.save(tokenizer, tmp_path / "ours"), (found, None))
    assert verify(ours.path) == []
    written = export(ours, "train", "megatron", tmp_path / "out")
    assert [path.read_bytes() for path in written] == [theirs.read_bytes(), theirs.with_suffix(".idx").read_bytes()]
