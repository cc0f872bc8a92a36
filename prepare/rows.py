"""Files to chunks of rows, column by column: parquet and jsonl a range at a time, other formats whole.

A chunk has at most 1,000 rows and, single rows aside, 4 MiB of text.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.errors import ConfigError, CorruptError, HostError, MillpondError, from_os_error

CHUNK_ROWS = 1000
CHUNK_BYTES = 4 << 20
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".txt")
DATASETS_LOADERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".arrow": "arrow"}
COMPRESSED = (".gz", ".zst", ".xz", ".bz2")

Rows = tuple[Any, ...]  # the text first, an Arrow array or a sequence, then the columns that filters ask for

_DAMAGE = (OSError, EOFError, ValueError, zlib.error, pa.ArrowException)  # what damaged files raise, all seen


def is_text(name: str) -> bool:
    """Whether documents can be read from a file of this name."""
    return name.endswith(SUFFIXES) or _loader(name) is not None


def chunks(path: Path, first: int, last: int, columns: Sequence[str]) -> Iterator[Rows]:
    """Row groups (parquet) or bytes (jsonl) `first` to `last` of a file; other files are read whole.

    `columns`: the text's, then others. A jsonl line belongs to the range its first byte is in. ConfigError when there
    is no such column, CorruptError with the place when the file cannot be read.
    """
    try:
        if path.name.endswith(".parquet"):
            yield from _parquet(path, first, last, columns)
        elif path.name.endswith(".jsonl"):
            yield from _chunked(_jsonl(path, first, last, columns))
        elif path.name.endswith(".jsonl.gz"):
            yield from _chunked(_jsonl_gz(path, columns))
        elif path.name.endswith(".txt"):
            text = path.read_bytes().decode("utf-8", "surrogateescape")
            yield from _chunked([_values({columns[0]: text}, str(path), columns[:1])])
        else:
            yield from _chunked(_by_datasets(path, columns))
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


def _jsonl_gz(path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    with gzip.open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            yield _parsed(line, f"{path}: line {number}", columns)


def _parsed(line: bytes, place: str, columns: Sequence[str]) -> tuple[Any, ...]:
    try:
        text = line.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
        row = json.loads(text) if text.strip() else {columns[0]: None}
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{place}: not JSON: {error}", "jsonl has one object a line", "mend that line") from error
    return _values(row, place, columns)


def _values(row: Any, place: str, columns: Sequence[str]) -> tuple[Any, ...]:
    """The columns' values; only the text's must be there."""
    if not isinstance(row, dict) or columns[0] not in row:
        names = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise _no_column(f"{place}: no field {columns[0]!r}, it has {names}", is_text=True)
    text = row[columns[0]]
    if text is not None and not isinstance(text, str):
        raise ConfigError(f"{place}: field {columns[0]!r} is {type(text).__name__}, not text", "", "mend that line")
    return tuple(row.get(name) for name in columns)


def _loader(name: str) -> str | None:
    """The loader of `datasets` that reads such a file."""
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return DATASETS_LOADERS.get(Path(name).suffix)


def _by_datasets(path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """The rows that the `datasets` library streams from the file; nothing is converted or cached on disk."""
    loader = _loader(path.name)
    if loader is None:
        raise ConfigError(f"{path}: unknown kind of file", f"text is read from {', '.join(SUFFIXES)}", "convert it")
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise HostError(f"{path}: is read by the datasets library, which cannot be loaded: {error}") from error
    options = {"sep": "\t"} if ".tsv" in path.name else {}
    try:
        stream = load_dataset(loader, data_files=str(path), split="train", streaming=True, **options)
        for number, row in enumerate(stream, 1):
            yield _values(row, f"{path}: row {number}", columns)
    except (DatasetsError, ImportError, UnicodeDecodeError) as error:
        raise _damaged(path, error, "") from error


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
