"""The bytes on disk, written out: FORMAT.md, the writer and the reader must agree on every one of them."""

import re
from pathlib import Path

import numpy as np
import pytest
from harness import complains

from shards import CorruptError, Shard, ShardHeader, ShardWriter
from shards.header import Placement

ROOT = Path(__file__).parent.parent.parent
FORMAT = (ROOT / "shards" / "FORMAT.md").read_text()
HASHES = np.array([0x1111111111111111, 0x2222222222222222], np.uint64)


def example(path: Path) -> Path:
    """FORMAT.md's example: two documents, "Hello, world" and "Hi", with GPT-2's tokenizer."""
    with ShardWriter(path, vocab_size=50257, eot=50256, placement="before", fingerprint="3f9a1c2e" * 8) as shard:
        tokens = np.array([50256, 15496, 11, 995, 50256, 17250], np.uint16)
        shard.append(tokens, np.array([0, 4]), HASHES)
        shard.seal()
    return path


def hex_dump() -> bytes:
    """The bytes of FORMAT.md's hex dump; a line with * stands for zeros up to the next address, as in xxd -a."""
    data = b""
    for line in re.findall(r"^([0-9a-f]{8}: .*)$", FORMAT, re.MULTILINE):
        address, _, rest = line.partition(": ")
        data = data.ljust(int(address, 16), b"\0")
        data += bytes.fromhex(rest.split("  ")[0].replace(" ", ""))
    return data


def test_the_hex_dump_is_what_the_writer_writes(tmp_path: Path) -> None:
    assert hex_dump() == example(tmp_path / "train-00000.bin").read_bytes()


def test_the_golden_bytes(tmp_path: Path) -> None:
    data = example(tmp_path / "train-00000.bin").read_bytes()
    assert data[:12] == bytes.fromhex("88d83401 01000000 06000000")  # 20240520, version 1, 6 tokens
    assert data[12:40] == bytes.fromhex("4d504e44 01000000 51c40000 50c40000 01000000 02000000 50c40000")
    assert data[48:80] == bytes.fromhex("3f9a1c2e" * 8)
    assert data[80:1024] == bytes(944)
    assert data[1024:] == bytes.fromhex("50c4 883c 0b00 e303 50c4 6243")
    assert len(data) == 1036


def test_the_reader_reads_what_format_md_says(tmp_path: Path) -> None:
    path = tmp_path / "train-00000.bin"
    path.write_bytes(hex_dump())
    shard = Shard(path)
    assert shard.tokens.tolist() == [50256, 15496, 11, 995, 50256, 17250]
    header = shard.header
    assert (header.vocab_size, header.eot, header.placement, header.documents) == (50257, 50256, "before", 2)
    assert header.fingerprint == "3f9a1c2e" * 8
    assert header.max_id == 50256
    shard.check_tokens()


def test_a_large_vocabulary_takes_the_second_form(tmp_path: Path) -> None:
    path = tmp_path / "train-00000.bin"
    with ShardWriter(path, vocab_size=70_000, eot=69_999, placement="after", fingerprint="00" * 32) as shard:
        shard.append(np.array([65_536, 69_999], np.uint32), np.array([0]), HASHES[:1])
        shard.seal()
    assert path.read_bytes()[:12] == bytes.fromhex("a1d93401 07000000 02000000")  # 20240801, version 7
    assert Shard(path).tokens.tolist() == [65_536, 69_999]
    assert Shard(path).header.dtype == np.uint32


def test_llmc_reads_our_header(tmp_path: Path) -> None:
    """llm.c and modded-nanogpt read 256 int32 and look at the first three."""
    path = example(tmp_path / "train-00000.bin")
    header = np.fromfile(path, "<i4", 256)
    assert header[:3].tolist() == [20240520, 1, 6]
    assert np.fromfile(path, "<u2", offset=1024).tolist() == [50256, 15496, 11, 995, 50256, 17250]


def test_header_round_trip() -> None:
    header = ShardHeader(
        tokens=10,
        documents=3,
        vocab_size=4096,
        eot=4095,
        placement="after",
        max_id=4095,
        xxh3=2**64 - 1,
        fingerprint="ab" * 32,
    )
    assert ShardHeader.unpack(header.pack(), "x") == header


@pytest.mark.parametrize(
    ("placement", "says"), [("before", "1 before"), ("after", "2 after"), (None, "0 where it was")]
)
def test_where_end_of_text_stands(placement: Placement | None, says: str) -> None:
    """Each value of word 7 is in FORMAT.md's row, also that of ready tokens, whose placement is not known."""
    header = ShardHeader(tokens=0, vocab_size=2, placement=placement, fingerprint="ab" * 32)
    assert int.from_bytes(header.pack()[28:32], "little") == int(says[0])
    assert ShardHeader.unpack(header.pack(), "x") == header
    (row,) = (line for line in FORMAT.splitlines() if line.startswith("| 7 |"))
    assert says in row


@pytest.mark.parametrize("length", range(0, 1024, 93))
def test_a_header_cut_anywhere_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(hex_dump()[:length])
    with complains(CorruptError, f"{length} bytes", "1024"):
        Shard(path)


@pytest.mark.parametrize(
    ("word", "value", "says"),
    [
        (0, 7, "word 0 is 7, a shard starts with 20240520 or 20240801"),
        (1, 2, "word 1 is version 2, expected 1"),
        (2, -1, "word 2 says -1 tokens"),
        (2, 7, "1,036 bytes, its header says 1,038"),
        (4, 9, "word 4 is format revision 9, this millpond reads 1"),
        (5, 0, "words 5-9 are not valid: vocabulary 0"),
        (5, 70_000, "words 5-9 are not valid: vocabulary 70000"),
        (6, 50257, "words 5-9 are not valid"),
        (7, 3, "words 5-9 are not valid"),
        (8, 7, "words 5-9 are not valid"),
        (9, 60_000, "words 5-9 are not valid"),
    ],
)
def test_every_word_is_checked(tmp_path: Path, word: int, value: int, says: str) -> None:
    words = np.frombuffer(hex_dump()[:1024], "<i4").copy()
    words[word] = value
    path = tmp_path / "x.bin"
    path.write_bytes(words.tobytes() + hex_dump()[1024:])
    with pytest.raises(CorruptError, match=says):
        Shard(path)
