"""Files to chunks of rows, column by column: parquet and jsonl a range at a time, other formats whole.

A chunk has at most 1,000 rows and, single rows aside, 4 MiB of text.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from shards.errors import ConfigError, CorruptError, MillpondError, from_os_error

CHUNK_ROWS = 1000
CHUNK_BYTES = 4 << 20
SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".tsv", ".txt", ".arrow")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")  # of all but parquet and arrow

Rows = tuple[Any, ...]  # the text first, an Arrow array or a sequence, then the columns that filters ask for

_DAMAGE = (OSError, EOFError, ValueError, csv.Error, zlib.error, lzma.LZMAError, pa.ArrowException)  # all seen


def kind_of(name: str) -> str:
    """The suffix that says how a file is read, compression aside; "" when documents cannot be read from it."""
    plain = name
    for suffix in COMPRESSED:
        plain = plain.removesuffix(suffix)
    kind = Path(plain).suffix
    return kind if kind in SUFFIXES and (plain == name or kind not in (".parquet", ".arrow")) else ""


def chunks(path: Path, first: int, last: int, columns: Sequence[str]) -> Iterator[Rows]:
    """Row groups (parquet) or bytes (jsonl) `first` to `last` of a file; other files are read whole.

    `columns`: the text's, then others. A jsonl line belongs to the range its first byte is in. ConfigError when there
    is no such column, CorruptError with the place when the file cannot be read.
    """
    kind = kind_of(path.name)
    try:
        if kind == ".parquet":
            yield from _parquet(path, first, last, columns)
        elif path.name.endswith(".jsonl"):
            yield from _chunked(_jsonl(path, first, last, columns))
        elif kind == ".arrow":
            yield from _chunked(_arrow(path, columns))
        elif kind:
            with _opened(path) as file:
                yield from _chunked(_READERS[kind](file, path, columns))
        else:
            raise ConfigError(f"{path}: unknown kind of file", f"text is read from {', '.join(SUFFIXES)}", "convert it")
    except _DAMAGE as error:
        raise _damaged(path, error, "") from error


def open_parquet(path: Path, columns: Sequence[str], file: IO[bytes] | None = None) -> pq.ParquetFile:
    """The file, its footer read, its columns found, the first of them text; read from `file` if it is not at `path`."""
    try:
        opened = pq.ParquetFile(file or path, memory_map=False, page_checksum_verification=True)
    except _DAMAGE as error:
        size = f"{path.stat().st_size:,} bytes" if file is None else "bytes"
        raise _damaged(path, error, f": {size} that are not a whole parquet file") from error
    schema = opened.schema_arrow
    for name in columns:
        if name not in schema.names:
            raise _no_column(f"{path}: no column {name!r}, it has {', '.join(schema.names)}", name == columns[0])
        if schema.names.count(name) > 1:
            raise ConfigError(f"{path}: more than one column is named {name!r}", "", "rename one")
    kind = schema.field(columns[0]).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise ConfigError(
            f"{path}: column {columns[0]!r} is {kind}, not text",
            "",
            "name another with --set corpus.text_column=NAME",
        )
    return opened


def _parquet(path: Path, first: int, last: int, columns: Sequence[str]) -> Iterator[Rows]:
    file = open_parquet(path, columns)
    wanted = list(dict.fromkeys(columns))
    for group in range(first, last):
        try:
            for batch in file.iter_batches(CHUNK_ROWS, row_groups=[group], columns=wanted, use_threads=False):
                yield from _bounded([batch.column(name) for name in columns])
        except _DAMAGE as error:
            raise _damaged(path, error, f": row group {group} of {file.num_row_groups}") from error


def _bounded(columns: list[Any]) -> Iterator[Rows]:
    """The columns' rows, cut where a chunk would grow past its bytes."""
    text = columns[0]
    if text.nbytes > CHUNK_BYTES and len(text) > 1:
        half = len(text) // 2
        yield from _bounded([column.slice(0, half) for column in columns])
        yield from _bounded([column.slice(half) for column in columns])
        return
    yield text, *(column.to_pylist() for column in columns[1:])


def _chunked(rows: Iterable[tuple[Any, ...]]) -> Iterator[Rows]:
    chunk: list[tuple[Any, ...]] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += len(row[0] or "")
        if len(chunk) == CHUNK_ROWS or size >= CHUNK_BYTES:
            yield tuple(zip(*chunk, strict=True))
            chunk, size = [], 0
    if chunk:
        yield tuple(zip(*chunk, strict=True))


def _jsonl(path: Path, first: int, last: int, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    with path.open("rb") as file:
        at = first
        if first:
            file.seek(first - 1)
            at += len(file.readline()) - 1  # the line that crosses into this range belongs to the one before
        while at < last and (line := file.readline()):
            yield _parsed(line, f"{path}: byte {at}", columns)
            at += len(line)


def _lines(file: IO[bytes], path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    for number, line in enumerate(file, 1):
        yield _parsed(line, f"{path}: line {number}", columns)


def _json(file: IO[bytes], path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """One array of objects, or one object a line."""
    start = file.read(1 << 10)
    if not start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        with _opened(path) as lines:  # not every compressed stream can go back
            yield from _lines(lines, path, columns)
        return
    try:
        rows = json.loads((start + file.read()).decode("utf-8-sig", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path}: not JSON: {error}", "it is one array of objects", "mend it") from error
    for number, row in enumerate(rows, 1):
        yield _values(row, f"{path}: object {number}", columns)


def _csv(file: IO[bytes], path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Every field is text as it stands there; one that a filter asks for is a number where it is spelled as one."""
    csv.field_size_limit(1 << 30)
    kind = kind_of(path.name)
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == ".tsv" else {"strict": True}
    with io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="") as text:
        for number, row in enumerate(csv.DictReader(text, **options), 1):
            found = _values(row, f"{path}: row {number}", columns)
            yield found[0], *map(_number, found[1:])


def _txt(file: IO[bytes], path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    if len(columns) > 1:
        raise _no_column(f"{path}: no column {columns[1]!r}, a text file has none", is_text=False)
    yield (file.read().decode("utf-8", "surrogateescape"),)


_READERS = {".jsonl": _lines, ".json": _json, ".csv": _csv, ".tsv": _csv, ".txt": _txt}


def _opened(path: Path) -> IO[bytes]:
    """The file, uncompressed as it is read."""
    if path.name.endswith(".gz"):
        return cast("IO[bytes]", gzip.open(path, "rb"))
    if path.name.endswith(".bz2"):
        return cast("IO[bytes]", bz2.open(path, "rb"))
    if path.name.endswith(".xz"):
        return cast("IO[bytes]", lzma.open(path, "rb"))
    if path.name.endswith(".zst"):
        return io.BufferedReader(pa.CompressedInputStream(path, "zstd"))  # which by itself knows no lines
    return path.open("rb")


def _number(text: str | None) -> int | float | str | None:
    """What a field of a csv file is to a filter: null when it is empty."""
    for kind in (int, float):
        try:
            return kind(text) if text else None
        except ValueError:
            continue
    return text


def _arrow(path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """The rows of an Arrow file as the `datasets` library writes them, streamed by it: nothing is cached on disk."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    with tempfile.TemporaryDirectory() as temp:
        link = Path(temp) / "rows.arrow"  # a name is a pattern there, and this one matches itself alone
        link.symlink_to(path)
        try:
            stream = load_dataset("arrow", data_files=str(link), split="train", streaming=True)
            for number, row in enumerate(stream, 1):
                yield _values(row, f"{path}: row {number}", columns)
        except DatasetsError as error:
            raise _damaged(path, error, "") from error


def _parsed(line: bytes, place: str, columns: Sequence[str]) -> tuple[Any, ...]:
    try:
        text = line.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
        row = json.loads(text) if text.strip() else {columns[0]: None}
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{place}: {_why(error)}", "jsonl has one object a line", "mend that line") from error
    return _values(row, place, columns)


def _why(error: ValueError | RecursionError) -> str:
    """What is wrong with a line of JSON, and in which of its columns: the decoder calls each of them line 1."""
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg}, column {error.colno} of the line that begins there"
    return f"not JSON: {error}"


def _values(row: Any, place: str, columns: Sequence[str]) -> tuple[Any, ...]:
    """The columns' values; only the text's must be there."""
    if not isinstance(row, dict) or columns[0] not in row:
        names = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__  # csv calls the surplus None
        raise _no_column(f"{place}: no field {columns[0]!r}, it has {names}", is_text=True)
    text = row[columns[0]]
    if text is not None and not isinstance(text, str):
        raise ConfigError(f"{place}: field {columns[0]!r} is {type(text).__name__}, not text", "", "mend that line")
    return tuple(row.get(name) for name in columns)


def _no_column(what: str, is_text: bool) -> ConfigError:
    if is_text:
        why, fix = "the documents are read from one field of text", "name it with --set corpus.text_column=NAME"
        return ConfigError(what, why, fix)
    return ConfigError(what, "corpus.filters asks for it", "mend the filter, or leave it out")


def _damaged(path: Path, error: Exception, where: str) -> MillpondError:
    if isinstance(error, OSError) and error.errno:
        return from_os_error(error, path, "read")
    return CorruptError(
        f"{path}{where}: cannot be read: {error}",
        "the file is damaged or was cut short: most often a download that did not finish",
        "fetch or copy the file again",
    )
