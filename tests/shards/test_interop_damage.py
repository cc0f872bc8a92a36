"""A stranger's file is read right or refused in words; and nothing goes out that should not."""

import os
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from foreign import EOT, folder_of, in_every_form, nanogpt, npy, read, record_of
from harness import complains
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shards import ConfigError, CorruptError, MillpondError, RefusedError, TokenFolder
from shards.interop import FORMATS, ForeignTokens, Format, export


@pytest.fixture
def four(tmp_path: Path) -> dict[str, Path]:
    return in_every_form(tmp_path)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """The test may not allocate more than a few MB at a time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("form", ["nanogpt", "npy", "llmc", "megatron"])
def test_an_id_outside_the_vocabulary(form: str, four: dict[str, Path]) -> None:
    with complains(
        CorruptError,
        f"{four[form]}: token 0 is 299, the vocabulary has 299 ids",
        "the file was written with another tokenizer, or does not hold tokens",
        "hint: name the tokenizer that the file was written with",
    ):
        read(four[form], EOT)


@pytest.mark.parametrize("value", [-1, EOT + 1, 2**32 + 5, -(2**63)])
def test_the_stray_id_is_found_wherever_it_is(value: int, tmp_path: Path) -> None:
    ids = np.zeros(600_000, "<i8")
    ids[543_210] = value
    with complains(CorruptError, "543,210", str(value), "300 ids"):
        read(npy(tmp_path / "x.npy", ids))


@pytest.mark.parametrize(("data", "vocab_size", "width"), [(b"abc", 300, 2), (b"", 300, 2), (b"\0" * 6, 70_000, 4)])
def test_a_file_without_a_header(data: bytes, vocab_size: int, width: int, tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(data)
    with complains(
        CorruptError,
        f"{path}: {len(data)} bytes, which is not a whole number of {width}-byte ids",
        f"without a header it is read as nanoGPT's, and a vocabulary of {vocab_size:,} takes {width} bytes an id",
        "hint: copy the file again from where it came",
    ):
        read(path, vocab_size)


def test_wider_ids_are_not_read_as_text_with_holes(tmp_path: Path) -> None:
    path = nanogpt(tmp_path / "x.bin", np.arange(3000, dtype="<u4") % EOT)
    with complains(CorruptError, "2,048", "0"):
        read(path)
    assert read(path, 70_000).tokens.tolist() == [i % EOT for i in range(3000)]


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((2, 2), "<u2"), r"an array of <u2 with shape \(2, 2\)"),
        (np.array(5, "<u2"), r"an array of <u2 with shape \(\)"),
        (np.zeros(2, ">u2"), "an array of >u2"),
        (np.zeros(2, "<f4"), "an array of <f4"),
        (np.zeros(2, "u1"), r"an array of \|u1"),
        (np.zeros(2, [("a", "<u2")]), "an array of"),
    ],
)
def test_arrays_that_are_no_ids(array: NDArray[np.generic], says: str, tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match=says):
        read(npy(tmp_path / "x.npy", array))


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<u2', 'fortran_order': False, 'shape': (1152921504606846976,), }",
        "{'descr': '<u2', 'fortran_order': False, 'shape': (4611686018427387904, 8), }",
        "{'descr': '<u2', 'fortran_order': False, 'shape': (-5,), }",
        "{'descr': '<u2', 'fortran_order': False, 'shape': (1L,), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
        "(" * 5000,
        "-" * 9000 + "1",
        "{'descr': '''",
        "    1\n  2",
        "",
        "\0",
    ],
)
def test_hostile_numpy_headers(header: str, tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    text = header.encode() + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + b"\0\0")
    with complains(CorruptError, "x.npy"):
        read(path)


def test_numpy_files_cut_and_grown(four: dict[str, Path]) -> None:
    path = four["npy"]
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with complains(CorruptError, "npy.npy"):
            read(path)
    path.write_bytes(data + b"\0")
    with complains(
        CorruptError,
        f"{path}: 139 bytes, its header says 138",
        "something was appended",
        "hint: copy the file again from where it came",
    ):
        read(path)


def test_npy_without_its_magic(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(b"\1\0\2\0")
    with complains(
        CorruptError,
        f"{path}: does not begin with numpy's magic",
        "it was damaged, or holds ids without a header, as OLMo's do",
        "hint: copy the file again from where it came, or rename it to .bin if it holds nothing but ids",
    ):
        read(path)


def test_a_shard_cut_short(four: dict[str, Path]) -> None:
    path = four["llmc"]
    path.write_bytes(path.read_bytes()[:-1])
    with complains(CorruptError, "1,034"):
        read(path)


def test_megatron_files_cut_and_grown(four: dict[str, Path]) -> None:
    path = four["megatron"]
    for file in (path, path.with_suffix(".idx")):
        data = file.read_bytes()
        for damaged in (*(data[:length] for length in range(len(data))), data + b"\0", data + b"\0\0"):
            file.write_bytes(damaged)
            with pytest.raises(CorruptError, match=r"megatron\.(bin|idx): "):
                read(path)
        file.write_bytes(data)
    assert len(read(path).starts) == 2


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize(
    ("at", "form", "value", "says"),
    [
        (0, "<7s", b"TNTIDX\0", r"idx: does not begin as a Megatron index does"),
        (9, "<Q", 2, r"idx: version 2 with tokens of type 8"),
        (17, "<B", 6, r"idx: version 1 with tokens of type 6"),
        (18, "<Q", 2**60, r"idx: 82 bytes, its header says 13,835,058,055,282,163,770"),
        (26, "<Q", 2**63, r"idx: 82 bytes, its header says"),
        (34, "<i", -3, r"bin: 10 bytes, the sequences in megatron\.idx have -2"),
        (34, "<i", 2**31 - 1, r"bin: 10 bytes, the sequences in megatron\.idx have 4,294,967,298"),
        (34, "<ii", (-3, 8), r"bin: 10 bytes, the sequences in megatron\.idx have 10"),
        (42, "<q", 2, r"idx: sequence 0 begins at byte 2, the one before ends at 0"),
        (50, "<q", -(2**63), r"idx: sequence 1 begins at byte -9,223,372,036,854,775,808, the one before ends at 6"),
        (58, "<q", 1, r"idx: its 3 document bounds do not run from sequence 0 to 2"),
        (66, "<q", 3, r"idx: its 3 document bounds"),
        (66, "<q", -(2**63), r"idx: its 3 document bounds"),
        (74, "<q", 1, r"idx: its 3 document bounds"),
    ],
)
def test_every_field_of_a_megatron_index(at: int, form: str, value: object, says: str, four: dict[str, Path]) -> None:
    index = four["megatron"].with_suffix(".idx")
    data = bytearray(index.read_bytes())
    struct.pack_into(form, data, at, *(value if isinstance(value, tuple) else (value,)))
    index.write_bytes(data)
    with pytest.raises(CorruptError, match=says):
        read(four["megatron"])


@settings(deadline=None, max_examples=300)
@given(
    form=st.sampled_from(["nanogpt", "npy", "llmc", "megatron", "index"]),
    at=st.integers(0, 200),
    flipped=st.binary(min_size=1, max_size=8),
    cut=st.integers(0, 4),
)
def test_damage_is_found_or_harmless(
    form: str, at: int, flipped: bytes, cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = in_every_form(tmp_path_factory.mktemp("damage"))["megatron" if form == "index" else form]
    file = path.with_suffix(".idx") if form == "index" else path
    data = bytearray(file.read_bytes())
    at %= len(data)
    data[at : at + len(flipped)] = flipped
    file.write_bytes(data[: len(data) - cut])
    try:
        found = read(path)
    except MillpondError as error:
        assert file.stem in str(error)
        return
    assert all(0 <= id <= EOT for id in found.tokens.tolist())
    starts = found.starts.tolist()
    assert starts == sorted({0, *starts} if len(found.tokens) else set())
    assert all(start < len(found.tokens) for start in starts)


def test_what_is_not_a_file(tmp_path: Path) -> None:
    with complains(ConfigError, "x.bin"):
        read(tmp_path / "x.bin")
    with pytest.raises(ConfigError, match="is not a file"):
        read(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="only POSIX systems have named pipes")
def test_a_pipe_is_not_waited_for(four: dict[str, Path], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.bin")
    with complains(ConfigError, "x.bin"):
        read(tmp_path / "x.bin")
    os.mkfifo(four["nanogpt"].with_suffix(".idx"))
    with complains(ConfigError, "nanogpt.idx"):
        read(four["nanogpt"])


@pytest.fixture
def ours(four: dict[str, Path], tmp_path: Path) -> TokenFolder:
    return folder_of(tmp_path / "ours", record_of(EOT + 1), (read(four["npy"]), None))


@pytest.mark.parametrize("form", FORMATS)
def test_an_empty_split_is_not_exported(form: Format, ours: TokenFolder, tmp_path: Path) -> None:
    with complains(
        RefusedError,
        f"{ours.path}: its val split has no tokens",
        "an empty file cannot be mapped, so no trainer could open it",
        "hint: export the other split, or prepare with another tokens.val_fraction",
    ):
        export(ours, "val", form, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_overwrites_nothing(ours: TokenFolder, tmp_path: Path) -> None:
    index = tmp_path / "train.idx"
    index.write_bytes(b"mine")
    with complains(
        RefusedError,
        f"{index}: is already there",
        "nothing is overwritten",
        "hint: remove it, or name another folder",
    ):
        export(ours, "train", "megatron", tmp_path)
    assert index.read_bytes() == b"mine"
    assert not (tmp_path / "train.bin").exists()


def test_an_empty_shard_among_others(four: dict[str, Path], tmp_path: Path) -> None:
    found = read(four["megatron"])
    none = ForeignTokens(found.tokens[:0], found.starts[:0], "before")
    folder = folder_of(tmp_path / "ours", record_of(EOT + 1), (found, None), (none, None))
    for path in export(folder, "train", "megatron", tmp_path / "out"):
        assert path.read_bytes() == four["megatron"].with_suffix(path.suffix).read_bytes()


@pytest.mark.parametrize("form", FORMATS)
def test_damaged_tokens_are_not_exported(form: Format, ours: TokenFolder, tmp_path: Path) -> None:
    path = ours.path / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"\7\0")
    with complains(CorruptError, "xxh3"):
        export(TokenFolder(ours.path), "train", form, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("starts", [[1, 3], [3, 0], [0, 5], [0, 0], [0, 2**63]])
def test_a_damaged_sidecar_is_not_exported(starts: list[int], ours: TokenFolder, tmp_path: Path) -> None:
    path = ours.path / "train-00000.docs.npy"
    docs = np.load(path)
    docs["start"] = starts
    np.save(path, docs)
    with pytest.raises(CorruptError, match="the documents in its sidecar do not follow one another"):
        export(TokenFolder(ours.path), "train", "megatron", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", ["a.bin", "a.npy"])
@pytest.mark.parametrize(
    ("data", "says"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 123456789\n",
            "a git-lfs pointer",
        ),
        (b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>", "an HTML page"),
        (b" \n<HTML><body>429 Too Many Requests</body></HTML>", "an HTML page"),
        (b"PK\x03\x04\x14\0", "a zip archive"),
        (b"\x1f\x8b\x08\0\0\0\0\0", "compressed with gzip"),
        (b"%PDF-1.7\n%", "a PDF"),
    ],
)
def test_a_page_or_a_pointer_instead_of_tokens(data: bytes, says: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with complains(CorruptError, name, says):
        read(tmp_path / name)
