"""What is written is what is read, across shard edges and without copying."""

import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
from harness import complains
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import ConfigError, CorruptError, Shard, ShardWriter, TokenFolder, TokenStream

DOCUMENTS = st.lists(st.lists(st.integers(0, 98), min_size=1, max_size=20), max_size=12)


def write(path: Path, documents: list[list[int]], batch: int = 3) -> None:
    """Documents with end-of-text (99) before each, appended a few at a time."""
    with ShardWriter(path, vocab_size=100, eot=99, placement="before", fingerprint="00" * 32) as shard:
        for first in range(0, len(documents), batch):
            chunk = documents[first : first + batch]
            tokens = [token for document in chunk for token in (99, *document)]
            starts = np.cumsum([0, *(len(document) + 1 for document in chunk)])[:-1]
            shard.append(np.array(tokens, np.uint16), starts, np.arange(len(chunk), dtype=np.uint64))
        shard.seal()


@settings(deadline=None, max_examples=60)
@given(shards=st.lists(DOCUMENTS, min_size=1, max_size=4), data=st.data())
def test_a_stream_is_the_concatenation_of_its_shards(
    shards: list[list[list[int]]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    for i, documents in enumerate(shards):
        write(folder / f"train-{i:05}.bin", documents)
    assert all((folder / f"train-{i:05}.bin").exists() == bool(shards[i]) for i in range(len(shards)))
    shards = [documents for documents in shards if documents]
    opened = [Shard(path) for path in sorted(folder.glob("train-*.bin"))]
    whole = [token for documents in shards for document in documents for token in (99, *document)]
    stream = TokenStream(opened, np.dtype("<u2"))
    assert len(stream) == len(whole)
    start = data.draw(st.integers(0, len(whole)))
    n = data.draw(st.integers(0, len(whole) - start))
    assert stream.window(start, n).tolist() == whole[start : start + n]
    out = np.empty(n, np.uint16)
    stream.read_into(start, out)
    assert out.tolist() == whole[start : start + n]
    for shard, documents in zip(opened, shards, strict=True):
        found = [shard.document(i).tolist() for i in range(shard.header.documents)]
        assert found == [[99, *document] for document in documents]


def test_a_window_inside_a_shard_is_a_view(tmp_path: Path) -> None:
    write(tmp_path / "train-00000.bin", [[1, 2, 3]])
    write(tmp_path / "train-00001.bin", [[4, 5, 6]])
    first, second = Shard(tmp_path / "train-00000.bin"), Shard(tmp_path / "train-00001.bin")
    stream = TokenStream([first, second], np.dtype("<u2"))
    assert np.shares_memory(stream.window(0, 4), first.tokens)
    assert np.shares_memory(stream.window(5, 2), second.tokens)
    across = stream.window(2, 4)
    assert across.tolist() == [2, 3, 99, 4]
    assert across.base is None or len(across.base) == 4  # a copy of four tokens and of no more


@pytest.mark.parametrize(("start", "n"), [(-1, 1), (0, -1), (0, 9), (8, 1), (7, 2)])
def test_a_window_outside_is_an_error(tmp_path: Path, start: int, n: int) -> None:
    write(tmp_path / "train-00000.bin", [[1, 2, 3], [4, 5, 6]])
    stream = TokenStream([Shard(tmp_path / "train-00000.bin")], np.dtype("<u2"))
    with pytest.raises(IndexError, match="the stream has 8"):
        stream.window(start, n)


def test_tokens_cannot_be_written_through_the_map(tmp_path: Path) -> None:
    write(tmp_path / "train-00000.bin", [[1, 2, 3]])
    with pytest.raises(ValueError, match="read-only"):
        Shard(tmp_path / "train-00000.bin").tokens[0] = 1


def test_nothing_appears_before_seal(tmp_path: Path) -> None:
    with ShardWriter(
        tmp_path / "train-00000.bin", vocab_size=100, eot=99, placement="before", fingerprint="00" * 32
    ) as shard:
        shard.append(np.array([99, 1], np.uint16), np.array([0]), np.zeros(1, np.uint64))
        assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert not list(tmp_path.iterdir())


def test_an_id_beyond_the_vocabulary_is_never_written(tmp_path: Path) -> None:
    with (
        ShardWriter(tmp_path / "t.bin", vocab_size=100, eot=99, placement="before", fingerprint="00" * 32) as shard,
        complains(CorruptError, "id 100", "100"),
    ):
        shard.append(np.array([99, 100], np.uint16), np.array([0]), np.zeros(1, np.uint64))


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / tiny_folder.name))


def test_a_folder_holds_every_document_once(tiny_folder: Path, texts: list[str]) -> None:
    tokens = TokenFolder(tiny_folder, verify="hash")
    found = []
    for split in ("train", "val"):
        for shard in tokens.shards(split):
            found += [tokens.tokenizer.decode(shard.document(i)[1:]) for i in range(shard.header.documents)]
    assert sorted(found) == sorted(texts)


def test_growth_does_not_disturb_who_pinned_fewer_parts(tiny_folder: Path) -> None:
    whole, pinned = TokenFolder(tiny_folder), TokenFolder(tiny_folder, parts=2)
    assert len(pinned.stream("train")) == sum(len(shard.tokens) for shard in whole.shards("train")[:2])


def test_more_parts_than_there_are(tiny_folder: Path) -> None:
    with complains(ConfigError, "99 parts"):
        TokenFolder(tiny_folder, parts=99)


def test_a_shard_of_another_vocabulary(folder: Path) -> None:
    path = folder / "train-00000.bin"
    data = bytearray(path.read_bytes())
    data[20:24] = (600).to_bytes(4, "little")
    path.write_bytes(data)
    with complains(
        CorruptError,
        f"{path}: vocabulary is 600, the manifest says 512",
        "the shard belongs to another token folder or another tokenizer",
        "hint: copy the file again from where it came, or millpond tokenize CONFIG --force",
    ):
        TokenFolder(folder)


def test_one_flipped_byte(folder: Path) -> None:
    path = folder / "train-00001.bin"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    TokenFolder(folder)  # sizes and headers are right
    with complains(CorruptError, "train-00001.bin", "xxh3"):
        TokenFolder(folder, verify="hash")


def test_a_truncated_shard(folder: Path) -> None:
    path = folder / "val-00000.bin"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-2])
    with complains(CorruptError, "val-00000.bin", f"{size - 2:,}", f"{size:,}"):
        TokenFolder(folder)


def test_a_missing_shard(folder: Path) -> None:
    (folder / "train-00000.bin").unlink()
    with complains(ConfigError, "train-00000.bin"):
        TokenFolder(folder)


def test_a_link_is_not_followed(folder: Path, tmp_path: Path) -> None:
    path = folder / "train-00000.bin"
    path.replace(tmp_path / "elsewhere.bin")
    path.symlink_to(tmp_path / "elsewhere.bin")
    with pytest.raises(CorruptError, match="links are not followed"):
        TokenFolder(folder)


def test_a_swapped_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.tiktoken"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(CorruptError, match="with another tokenizer every token means something else"):
        TokenFolder(folder).tokenizer  # noqa: B018


def npy(header: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


@pytest.mark.parametrize(
    "data",
    [b"", b"PK\x03\x04" + b"\0" * 60, npy(b"(" * 200), npy(b'{"descr": """'), npy(b"{'descr': '|O', 'shape': (1,)}")],
    ids=["empty", "a zip", "deep", "an open string", "objects"],
)
def test_a_sidecar_that_is_none(folder: Path, data: bytes) -> None:
    """numpy.load has five kinds of exception for these."""
    (folder / "train-00000.docs.npy").write_bytes(data)
    with complains(CorruptError, "train-00000.docs.npy"):
        TokenFolder(folder).shards("train")[0].documents  # noqa: B018


def test_a_sidecar_of_another_length(folder: Path) -> None:
    path = folder / "train-00000.docs.npy"
    data = path.read_bytes()
    shard = TokenFolder(folder).shards("train")[0]
    for damaged in (data[:-16], data + data[-16:], data[:-1]):
        path.write_bytes(damaged)
        with pytest.raises(CorruptError, match=r"bytes cannot be [0-9,]+ documents"):
            shard.documents  # noqa: B018
    path.write_bytes((folder / "val-00000.docs.npy").read_bytes())
    with pytest.raises(CorruptError, match=r"documents, expected"):
        shard.documents  # noqa: B018


def test_the_sidecar_is_what_numpy_loads(folder: Path) -> None:
    for shard in TokenFolder(folder).shards("val"):
        loaded = np.load(shard.path.with_suffix(".docs.npy"), allow_pickle=False)
        assert loaded.dtype == shard.documents.dtype
        assert np.array_equal(loaded, shard.documents)


def test_a_sidecar_behind_a_link_is_not_followed(folder: Path, tmp_path: Path) -> None:
    path = folder / "train-00000.docs.npy"
    path.replace(tmp_path / "elsewhere.npy")
    path.symlink_to(tmp_path / "elsewhere.npy")
    with pytest.raises(CorruptError, match="links are not followed"):
        TokenFolder(folder).shards("train")[0].documents  # noqa: B018


@pytest.mark.parametrize(("vocab_size", "eot"), [(513, 511), (512, 5)])
def test_a_tokenizer_of_another_size(folder: Path, vocab_size: int, eot: int) -> None:
    tokens = TokenFolder(folder)
    tokenizer = msgspec.structs.replace(tokens.manifest.tokenizer, vocab_size=vocab_size, eot=eot)
    tokens.manifest = msgspec.structs.replace(tokens.manifest, tokenizer=tokenizer)
    with complains(CorruptError, "511", str(vocab_size), str(eot)):
        tokens.tokenizer  # noqa: B018
