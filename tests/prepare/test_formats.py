"""One guard for all formats: what is refused or repaired in one is in every other. Each test is one guard."""

import gzip
import io
import lzma
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from harness import complains
from tables import ALL, PACK, ROWS, TEXTUAL, arrow, big_window, documents, parquet, written

from prepare.text.documents import read
from prepare.text.formats import COMPRESSED, FORMATS, bytes_per_token, cut_of, kind_of, unknown
from prepare.text.rows import CHUNK_BYTES
from shards import ConfigError, CorruptError

each_format = pytest.mark.parametrize("name", ALL)
each_of_rows = pytest.mark.parametrize("name", ROWS)
each_of_text = pytest.mark.parametrize("name", TEXTUAL)
each_compression = pytest.mark.parametrize("suffix", PACK)


def test_every_format_is_tested_here() -> None:
    assert {kind_of(name) for name in ALL} == set(FORMATS)
    assert set(PACK) == set(COMPRESSED)
    for suffix, each in FORMATS.items():
        assert kind_of(f"a{suffix}") == suffix and cut_of(f"a{suffix}") == each.cut
        assert (kind_of(f"a{suffix}.gz") == suffix) == each.compressible and cut_of(f"a{suffix}.gz") == "never"
        assert bytes_per_token(f"a{suffix}") == each.bytes_per_token
        for packed in COMPRESSED if each.compressible else ():
            assert 0.2 < bytes_per_token(f"a{suffix}{packed}") / each.bytes_per_token < 0.5


@each_format
def test_read(tmp_path: Path, name: str) -> None:
    texts = ["one", "two 漢字 \U0001f600", 'a "quoted"\nline,\tand more', "1984"]
    found, counts = documents(written(tmp_path, name, ALL[name]({"n": [1, 2, 3, 4], "text": texts})))
    assert found == (texts if name in ROWS else texts[:1])
    assert counts.rows == len(found) and not counts.repaired


@each_of_text
@each_compression
def test_compressed(tmp_path: Path, name: str, suffix: str) -> None:
    data = ALL[name]({"text": ["one", "two 漢字"]})
    expected = documents(written(tmp_path, name, data))
    assert documents(written(tmp_path, name + suffix, PACK[suffix](data))) == expected
    several = PACK[suffix](data[:9]) + PACK[suffix](data[9:])  # as pigz, pbzip2 and cat make them
    assert documents(written(tmp_path, name + suffix, several)) == expected
    window = {".zst": big_window, ".xz": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)}
    assert documents(written(tmp_path, name + suffix, window.get(suffix, PACK[suffix])(data))) == expected


@each_of_text
@each_compression
def test_a_compressed_file_is_complete_or_an_error(tmp_path: Path, name: str, suffix: str) -> None:
    data = PACK[suffix](ALL[name]({"text": ["some text " * 50]}))
    empty, cut, garbage, other = b"", data[:-3], data + b"garbage", b"plain text"
    for broken in (empty, cut, data + data[: len(data) // 2], garbage, other):
        path = written(tmp_path, name + suffix, broken)
        with complains(CorruptError, f"{name}{suffix}", "fetch or copy"):
            documents(path)


@each_of_rows
def test_a_column_twice(tmp_path: Path, name: str) -> None:
    column = pa.array(["a", "b"])
    twice = pa.Table.from_arrays([column, column], names=["text", "text"])
    data = {
        ".parquet": parquet,
        ".arrow": arrow,
        ".jsonl": lambda _: b'{"text": "a"}\n{"text": "a", "text": "b"}\n',
        ".json": lambda _: b'[{"text": "a", "text": "b"}]' if name == "a.json" else b'{"text": "a", "text": "b"}\n',
        ".csv": lambda _: b"text,text\na,b\n",
        ".tsv": lambda _: b"text\ttext\na\tb\n",
    }[kind_of(name)](twice)
    with complains(ConfigError, "'text'"):
        documents(written(tmp_path, name, data))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "lines.json"])
def test_a_name_twice_in_json(tmp_path: Path, name: str) -> None:
    """However it is spelled; but not in an object inside, and not of a column that nobody asks for."""
    rows = {
        '{"text": "a", "m": {"text": 1, "text": 2}, "x": 1, "x": 2}': True,
        '{"text": "a", "te\\u0078t": "b"}': False,
    }
    for row, is_read in rows.items():
        path = written(tmp_path, name, f"[{row}]".encode() if name == "a.json" else row.encode())
        if is_read:
            assert documents(path)[0] == ["a"]
            continue
        with complains(ConfigError, "'text'"):
            documents(path)


def test_json_below_blank_lines(tmp_path: Path) -> None:
    assert documents(written(tmp_path, "a.json", b"\n" * 3000 + b'[{"text": "a"}]'))[0] == ["a"]


@each_of_rows
def test_text_is_compared_as_text(tmp_path: Path, name: str) -> None:
    words = ["nan", "1984", "null", "true", "1_0", "en", "1e3"]
    path = written(tmp_path, name, ROWS[name]({"lang": words, "text": [f"text of {word}" for word in words]}))
    for word in words:
        assert documents(path, [f'lang == "{word}"'])[0] == [f"text of {word}"]
        assert len(documents(path, [f'lang != "{word}"'])[0]) == len(words) - 1
    with complains(ConfigError, "'lang'", "5"):
        documents(path, ["lang >= 5"])


@each_of_rows
def test_numbers_are_compared_as_numbers(tmp_path: Path, name: str) -> None:
    numbers = [9, 10, 100.5, None, -2, float("nan")]
    path = written(tmp_path, name, ROWS[name]({"n": numbers, "text": [f"text of {number}" for number in numbers]}))
    assert documents(path, ["n >= 10"])[0] == ["text of 10", "text of 100.5"]
    assert documents(path, ["n < 10"])[0] == ["text of 9", "text of -2"]


def test_numbers_of_any_type_and_size(tmp_path: Path) -> None:
    tenths = [Decimal("0.1"), Decimal("0.3"), None]
    for kind in (pa.decimal128(3, 1), pa.decimal256(60, 1), pa.float64(), pa.float32(), pa.int8(), pa.uint64()):
        whole = pa.types.is_integer(kind)
        number = pa.array([1, 3, None] if whole else tenths, None if whole else pa.decimal128(3, 1)).cast(kind)
        table = pa.table({"text": ["one", "three", "none"], "n": number})
        for name, data in (("a.parquet", parquet(table)), ("a.arrow", arrow(table))):
            path = written(tmp_path, name, data)
            assert documents(path, ["n >= 2" if whole else "n >= 0.2"])[0] == ["three"], (name, kind)
    exact = pa.table({"text": ["one", "three"], "n": pa.array(tenths[:2], pa.decimal128(3, 1))})
    assert documents(written(tmp_path, "a.parquet", parquet(exact)), ["n == 0.1"])[0] == ["one"]
    huge = b"n,text\n" + b"9" * 5000 + b",more than any number\n-" + b"9" * 5000 + b",less\n7,seven\n"
    assert documents(written(tmp_path, "a.csv", huge), ["n > 7"])[0] == ["more than any number"]


@each_of_rows
def test_a_column_that_is_not_there(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, name, ROWS[name]({"n": [1], "title": ["x"], "text": ["a"]}))
    with pytest.raises(ConfigError, match=r"no (column|field) 'body', it has n, title, text"):
        documents(path, column="body")


@each_of_rows
def test_nulls_and_nothing(tmp_path: Path, name: str) -> None:
    found, counts = documents(written(tmp_path, name, ROWS[name]({"n": [1, 2, 3], "text": ["a", None, "b"]})))
    assert (found, counts.rows, counts.dropped) == (["a", "b"], 3, {"null": 1})
    for table, rows in (({"n": [1, 2], "text": [None, None]}, 2), ({"n": [], "text": []}, 0)):  # no type of its own
        found, counts = documents(written(tmp_path, name, ROWS[name](table)))
        assert (found, counts.rows, counts.dropped.get("null", 0)) == ([], rows, rows)


def test_no_byte_at_all(tmp_path: Path) -> None:
    for name in ALL:
        path = written(tmp_path, name, b"")
        if name.endswith((".parquet", ".arrow")):
            with complains(CorruptError, "0 bytes"):
                documents(path)
        else:
            assert documents(path)[0] == []


@each_of_text
def test_a_byte_order_mark(tmp_path: Path, name: str) -> None:
    data = ALL[name]({"text": ["first", "second"]})
    assert documents(written(tmp_path, name, b"\xef\xbb\xbf" + data)) == documents(written(tmp_path, f"b{name}", data))
    wide = data.decode().encode("utf-16")
    with complains(ConfigError, "UTF-16", "UTF-8"):
        documents(written(tmp_path, name, wide))


@each_format
def test_bytes_that_are_not_utf8(tmp_path: Path, name: str) -> None:
    bad = pa.array([b"caf\xe9 au lait", b"fine"], pa.binary()).view(pa.string())
    if name.endswith((".parquet", ".arrow")):
        columns = {
            "large": lambda: bad.view(pa.binary()).cast(pa.large_binary()).view(pa.large_string()),
            "dictionary": lambda: pa.DictionaryArray.from_arrays(pa.array([0, 1]), bad),
            "view": lambda: bad.cast(pa.string_view()),
            "binary": lambda: bad.view(pa.binary()),
            "large_binary": lambda: bad.view(pa.binary()).cast(pa.large_binary()),
            "extension": lambda: pa.ExtensionArray.from_storage(pa.json_(pa.string()), bad),
        }
        column = columns.get(name.partition(".")[0], lambda: bad)()
        table = pa.table({"lang": column, "text": column})  # a filter's column is as the text's
        data = arrow(table, pa.ipc.new_file if name == "file.arrow" else pa.ipc.new_stream)
        data = parquet(table) if name.endswith(".parquet") else data
    else:
        word = "caf\ue009 au lait"
        data = ALL[name]({"lang": [word, "fine"], "text": [word, "fine"]})
        data = data.replace(b"\\ue009", b"\xe9").replace("\ue009".encode(), b"\xe9")
    path = written(tmp_path, name, data)
    found, counts = documents(path)
    assert found == ["caf\ufffd au lait", "fine"][: len(found)] and counts.repaired == 1
    if name in ROWS:
        assert documents(path, ['lang == "fine"'])[0] == ["fine"]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 123456789\n"
STRANGERS = {
    "a git-lfs pointer": POINTER,
    "an HTML page": b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title>",
    "a PDF": b"%PDF-1.7\n%\xe2\xe3",
    "a zip archive": b"PK\x03\x04\x14\0\0\0",
    "compressed with gzip": gzip.compress(b"text"),
    "compressed with zstd": zstandard.compress(b"text"),
    "an Arrow stream": arrow(pa.table({"text": ["a"]})),
    "a server's error message": b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>',
    "text in UTF-16": "words without a mark".encode("utf-16-le"),
    "text in UTF-32": "words with a mark".encode("utf-32"),
}


@each_format
def test_something_else_in_its_place(tmp_path: Path, name: str) -> None:
    for what, data in STRANGERS.items():
        if what == "an Arrow stream" and name.endswith(".arrow"):
            continue
        with complains(ConfigError, name, what):
            documents(written(tmp_path, name, data))
        if name in TEXTUAL:
            with complains(ConfigError, what):
                documents(written(tmp_path, f"{name}.gz", gzip.compress(data)))
            with complains(ConfigError, what):  # a clone without git-lfs has pointers there, too
                documents(written(tmp_path, f"{name}.xz", data))


@pytest.mark.parametrize(
    "text",
    [
        "PAR1 is how a parquet file begins.",
        "ARROW1, said the archer.",
        "<!DOCTYPE book>\n<book>",
        "<header>",
        "BZh9 is how bzip2 begins.",
        "Obj and Rar! are words.",
        (POINTER.decode() + "\nis what a pointer looks like. ") * 20,
        "\0" * 40,
    ],
)
def test_text_about_formats_is_text(tmp_path: Path, text: str) -> None:
    assert documents(written(tmp_path, "a.txt", text.encode()))[0] == [text]


@pytest.mark.parametrize("delimiter", [",", "\t"])
@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ('1,"two\nlines"\n2\n', "line 4: 1 fields, the header has 2"),
        ("1,a\n2,b,c\n", "line 3: 3 fields, the header has 2"),
        ('1,a\n2,"open\n', "line 3: unexpected end of data"),
        ('1,"a" b\n', "line 2: .* expected after"),
    ],
)
def test_a_row_that_is_no_row_names_its_line(tmp_path: Path, delimiter: str, rows: str, says: str) -> None:
    data = f"n,text\n{rows}".replace(",", delimiter).encode()
    with pytest.raises(CorruptError, match=says):
        documents(written(tmp_path, "a.csv" if delimiter == "," else "a.tsv", data))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_ends_of_lines(tmp_path: Path, end: str) -> None:
    assert documents(written(tmp_path, "a.csv", f"text{end}a{end}{end}b".encode()))[0] == ["a", "b"]
    assert documents(written(tmp_path, "a.tsv", f"n\ttext{end}1\ta\0{end}".encode()))[0] == ["a\0"]
    lines = f'{{"text": "a"}}{end}{end}{{"text": "b\\r"}}'.encode()
    for name in ("a.jsonl", "a.json"):
        assert documents(written(tmp_path, name, lines))[0] == ["a", "b\r"]
    spread = b'{"text":\r"a",\r"n": 1}\n{"text": "b"}'  # where JSON lets white space be
    assert documents(written(tmp_path, "a.jsonl", spread))[0] == ["a", "b"]
    with complains(CorruptError, "byte 0", "row 2", "JSON", "column 10"):
        documents(written(tmp_path, "a.jsonl", b'{"text": "a"}\r{"text": }\r'))


def test_a_stream_of_arrow_that_was_cut(tmp_path: Path) -> None:
    table = pa.table({"text": [f"text {i}" for i in range(100)], "n": pa.array([None] * 100, pa.int64())})
    out, ends = io.BytesIO(), []
    with pa.ipc.new_stream(out, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=10):
            writer.write_batch(batch)
            ends.append(out.tell())
    whole = out.getvalue()
    assert whole[: ends[0]].endswith(b"\0" * 8)  # as the end of a stream does
    for length in (*ends, len(whole) // 2, 100, 3):
        with pytest.raises(CorruptError):
            documents(written(tmp_path, "a.arrow", whole[:length]))


@pytest.mark.parametrize(
    "name",
    ["a.html", "a.HTM", "a.pdf", "a.docx", "a.zip", "a.tar.gz", "a.ndjson", "a.TXT", "a.Jsonl.GZ", "a.parquet.gz", "a"],
)
def test_what_is_no_text_has_a_hint(name: str) -> None:
    assert not kind_of(name)
    error = unknown("", name)
    assert f"{name}: unknown kind of file" in str(error) and error.fix
    if name in ("a.TXT", "a.Jsonl.GZ"):
        assert "lower case" in error.fix
    if name in ("a.html", "a.pdf", "a.zip", "a.ndjson", "a.TXT"):
        assert "corpus.files" not in error.fix


def test_a_dictionary_is_cut_by_its_rows(tmp_path: Path) -> None:
    """Not into single rows because the dictionary that each slice has with it is large."""
    texts = [f"{i} " * 500 for i in range(6000)]
    column = pa.array([*texts, *texts]).dictionary_encode()
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    sizes = [(len(batch.texts), batch.counts.text_bytes) for batch in read(tmp_path / "a.parquet", 0, 1, "text")]
    assert sum(rows for rows, _ in sizes) == 12_000
    assert len(sizes) < 20 and max(nbytes for _, nbytes in sizes) <= CHUNK_BYTES


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.binary_view()])
def test_a_dictionary_of_any_text(tmp_path: Path, kind: pa.DataType) -> None:
    column = pa.DictionaryArray.from_arrays(pa.array([1, None, 0], pa.uint8()), pa.array(["a", "b"]).cast(kind))
    table = pa.table({"text": column, "lang": column})
    path = written(tmp_path, "a.arrow", arrow(table))
    assert documents(path)[0] == ["b", "a"]
    assert documents(path, ['lang == "b"'])[0] == ["b"]
