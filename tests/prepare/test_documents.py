"""Whatever a file holds becomes documents or is counted; nothing is lost and nothing changes by itself."""

import bz2
import csv
import gzip
import io
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from harness import complains

from prepare.text.documents import read
from prepare.text.rows import CHUNK_BYTES, open_parquet
from shards import ConfigError, CorruptError
from shards.manifest import Counts

TEXTS = ["one", "two 漢字", "three\r\n\x00", "<|endoftext|> four", "x" * 3000]


def everything(path: Path, first: int = 0, last: int = 1 << 40, column: str = "text") -> tuple[list[str], Counts]:
    if path.name.endswith(".parquet"):
        last = min(last, open_parquet(path, [column]).num_row_groups)
    texts: list[str] = []
    counts = Counts()
    for batch in read(path, first, last, column):
        texts += batch.texts
        counts = counts.plus(batch.counts)
        assert batch.hashes.tolist() == [xxhash.xxh3_64_intdigest(text.encode()) for text in batch.texts]
    return texts, counts


def parquet(path: Path, column: pa.Array, **options: object) -> Path:
    pq.write_table(pa.table({"id": list(range(len(column))), "text": column}), path, **options)
    return path


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
def test_parquet(tmp_path: Path, kind: pa.DataType, compression: str) -> None:
    path = parquet(tmp_path / "a.parquet", pa.array(TEXTS, kind), compression=compression, row_group_size=2)
    assert everything(path)[0] == TEXTS
    assert everything(path, 1, 2)[0] == TEXTS[2:4]


def test_jsonl_and_its_compressed_form(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in TEXTS)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert everything(tmp_path / "a.jsonl")[0] == TEXTS
    assert everything(tmp_path / "a.jsonl.gz")[0] == TEXTS


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("first\r\n\r\nsecond\n漢字".encode())
    assert everything(tmp_path / "a.txt")[0] == ["first\r\n\r\nsecond\n漢字"]


def test_every_cut_of_a_jsonl_file_gives_every_line_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS[:4]))
    size = path.stat().st_size
    for cut in range(size + 1):
        assert everything(path, 0, cut)[0] + everything(path, cut, size)[0] == TEXTS[:4], cut


def test_rows_that_are_no_documents_are_counted(tmp_path: Path) -> None:
    rows = ["a", None, "", "b <|endoftext|>", None]
    path = parquet(tmp_path / "a.parquet", pa.array(rows, pa.string()))
    texts, counts = everything(path)
    assert texts == ["a", "b <|endoftext|>"]
    assert counts == Counts(rows=5, dropped={"null": 2, "empty": 1}, literal_eot=1, text_bytes=16)


def test_lone_surrogates_are_repaired_as_tiktoken_does(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(r'{"text": "a \ud83d\ude00 pair, a \ud83d lone one"}' + "\n")
    texts, counts = everything(tmp_path / "a.jsonl")
    assert texts == ["a \U0001f600 pair, a \ufffd lone one"]
    assert counts.repaired == 1


def test_bytes_that_are_not_utf8_are_repaired(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "caf\xe9 au lait"}\n{"text": "fine"}\n')
    bad = pa.array([b"caf\xe9 au lait", b"fine"], pa.binary()).view(pa.string())
    parquet(tmp_path / "a.parquet", bad)
    for name, expected in (("a.txt", 1), ("a.jsonl", 2), ("a.parquet", 2)):
        texts, counts = everything(tmp_path / name)
        assert texts == ["caf\ufffd au lait", "fine"][:expected]
        assert counts.repaired == 1, name


def test_batches_are_bounded_by_bytes(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", pa.array(["x" * 1_000_000] * 20))
    batches = list(read(path, 0, 1, "text"))
    assert sum(len(batch.texts) for batch in batches) == 20
    assert max(batch.counts.text_bytes for batch in batches) <= CHUNK_BYTES


def test_no_rows(tmp_path: Path) -> None:
    assert everything(parquet(tmp_path / "a.parquet", pa.array([], pa.string())))[0] == []
    (tmp_path / "a.jsonl").write_bytes(b"")
    assert everything(tmp_path / "a.jsonl")[0] == []


def test_no_text_column(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"content": ["a"], "url": ["b"]}), path)
    with complains(
        ConfigError,
        f"{path}: no column 'text', it has content, url",
        "the documents are read from one field of text",
        "hint: name it with --set corpus.text_column=NAME",
    ):
        everything(path)
    assert everything(path, column="content")[0] == ["a"]


def test_a_column_of_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [1, 2]}), path)
    with complains(ConfigError, "'text'", "int64"):
        everything(path)


def test_a_truncated_parquet(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", pa.array(TEXTS))
    data = path.read_bytes()
    for length in (0, 3, 10, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(CorruptError) as caught:
            everything(path)
        assert str(caught.value).startswith(
            f"{path}: {length:,} bytes that are not a complete parquet file: cannot be read"
        )
        assert "fetch or copy the file again" in str(caught.value)


def test_a_damaged_page_names_its_row_group(tmp_path: Path) -> None:
    texts = ["some words of text " * 50] * 100
    path = parquet(
        tmp_path / "a.parquet",
        pa.array(texts),
        row_group_size=50,
        write_page_checksum=True,
        compression="none",
        use_dictionary=False,
    )
    data = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(1).column(1)
    data[column.data_page_offset + column.total_compressed_size - 500] ^= 1
    path.write_bytes(data)
    assert len(everything(path, 0, 1)[0]) == 50
    with complains(CorruptError, "a.parquet", "group 1"):
        everything(path)


def test_a_damaged_gzip(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    data = gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode())
    for damaged in (data[:-9], data[:20] + b"\xff\xff" + data[22:], b"no gzip at all"):
        path.write_bytes(damaged)
        with pytest.raises(CorruptError, match="gzip"):
            everything(path)


@pytest.mark.parametrize(
    ("line", "kind", "says"),
    [
        ("{not json}", CorruptError, "byte 14: not JSON: .*, column 2 of the line that begins there"),
        ('{"body": "x"}', ConfigError, "byte 14: no field 'text', it has body"),
        ("[1]", ConfigError, "byte 14: no field 'text', it has list"),
        ('{"text": 5}', ConfigError, "byte 14: field 'text' is int, not text"),
        ("[" * 100_000, CorruptError, "byte 14: not JSON"),
    ],
)
def test_a_bad_line_names_its_place(tmp_path: Path, line: str, kind: type[Exception], says: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ok"}'.replace(": ", ":") + "\n" + line + "\n")
    with pytest.raises(kind, match=says):
        everything(path)


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz", ".zst"])
def test_csv_and_tsv_are_read_as_they_are_spelled(tmp_path: Path, suffix: str) -> None:
    pack = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(suffix, zstd)
    rows = ["NA", "null", "007", "1.50", 'two\nlines, "quoted"', "漢字", "2024-01-01", "x" * 200_000]
    out = io.StringIO()
    csv.writer(out).writerows([("text", "n"), *((row, i) for i, row in enumerate(rows))])
    path = tmp_path / f"a[1].csv{suffix}"
    path.write_bytes(pack(out.getvalue().encode()))
    assert everything(path)[0] == rows
    path = tmp_path / f"b.tsv{suffix}"
    path.write_bytes(pack("".join(f"{row}\t1\n" for row in ["text", 'open " quote', "x"]).encode()))
    assert everything(path)[0] == ['open " quote', "x"]


def test_json_as_one_array_or_as_lines(tmp_path: Path) -> None:
    rows = [{"text": text} for text in [*TEXTS, "2024-01-01", "\ud800"]]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.json").write_text("\n".join(map(json.dumps, rows)))
    for name in ("a.json", "b.json"):
        assert everything(tmp_path / name)[0] == [*TEXTS, "2024-01-01", "\ufffd"]
    (tmp_path / "c.json").write_text('[{"text": "a"}, {"text"')
    with complains(CorruptError, "c.json", "JSON"):
        everything(tmp_path / "c.json")


def test_arrow_files(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    with pa.ipc.new_stream(path, (table := pa.table({"text": TEXTS})).schema) as out:
        out.write_table(table)
    assert everything(path)[0] == TEXTS


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_damaged_compression(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(b"nothing of the kind" * 100)
    with complains(CorruptError, "1,900"):
        everything(path)


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


@pytest.mark.parametrize("kind", [".jsonl", ".json"])
@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_lines_of_json_compressed(tmp_path: Path, kind: str, suffix: str) -> None:
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(suffix, zstd)
    path = tmp_path / f"a{kind}{suffix}"
    path.write_bytes(pack("".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()))
    assert everything(path)[0] == TEXTS
