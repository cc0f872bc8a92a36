"""Files to batches of clean text. A row is a document, or it is counted as null or empty; nothing disappears.

No normalisation: a document is kept byte for byte. Only what UTF-8 cannot hold becomes U+FFFD, and is counted.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from shards.errors import ConfigError, CorruptError, MillpondError, from_os_error
from shards.manifest import Counts
from shards.tokenizer import EOT_TEXT

BATCH_ROWS = 1000
BATCH_BYTES = 4 << 20
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".txt")

_SURROGATE = re.compile("[\ud800-\udfff]")  # a lone half of a UTF-16 pair, or (escaped so) a byte that is not UTF-8
_DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    zlib.error,
    pa.ArrowException,
)  # what damaged parquet and gzip raise, all seen


class Batch(NamedTuple):
    """At most 1,000 documents and, single documents aside, 4 MiB: `texts`, and `hashes`, the xxh3-64 of their UTF-8."""

    texts: list[str]
    hashes: NDArray[np.uint64]
    counts: Counts


def read(path: Path, first: int, last: int, text_column: str) -> Iterator[Batch]:
    """The documents of row groups (parquet) or bytes (jsonl) `first` to `last` of a file; other files are read whole.

    A jsonl line belongs to the range its first byte is in. ConfigError when there is no such text column, CorruptError
    with the place when the file cannot be read.
    """
    rows: Iterable[list[str | None]]
    try:
        if path.name.endswith(".parquet"):
            rows = _parquet(path, first, last, text_column)
        elif path.name.endswith(".jsonl"):
            rows = _chunked(_jsonl(path, first, last, text_column))
        elif path.name.endswith(".jsonl.gz"):
            rows = _chunked(_jsonl_gz(path, text_column))
        elif path.name.endswith(".txt"):
            rows = [[path.read_bytes().decode("utf-8", "surrogateescape")]]
        else:
            raise ConfigError(
                f"{path}: unknown kind of file", f"text is read from {', '.join(SUFFIXES)}", "convert or rename it"
            )
        for chunk in rows:
            yield _clean(chunk)
    except _DAMAGE as error:
        raise _damaged(path, error, "") from error


def _clean(rows: list[str | None]) -> Batch:
    """Drop nulls and empties, mend what UTF-8 cannot hold, hash, and count it all."""
    texts = [row for row in rows if row]
    null, repaired = rows.count(None), 0
    try:
        data = [text.encode() for text in texts]
    except UnicodeEncodeError:
        mended = [_SURROGATE.sub("\ufffd", text) for text in texts]
        repaired = sum(before != after for before, after in zip(texts, mended, strict=True))
        texts, data = mended, [text.encode() for text in mended]
    counts = Counts(
        rows=len(rows),
        null=null,
        empty=len(rows) - null - len(texts),
        repaired=repaired,
        literal_eot=sum(EOT_TEXT in text for text in texts),
        text_bytes=sum(map(len, data)),
    )
    return Batch(texts, np.fromiter(map(xxhash.xxh3_64_intdigest, data), np.uint64, len(data)), counts)


def _chunked(rows: Iterable[str | None]) -> Iterator[list[str | None]]:
    chunk: list[str | None] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += len(row or "")
        if len(chunk) == BATCH_ROWS or size >= BATCH_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def open_parquet(path: Path, text_column: str) -> pq.ParquetFile:
    """The file, its footer read and its text column found."""
    try:
        file = pq.ParquetFile(path, memory_map=False, page_checksum_verification=True)
    except _DAMAGE as error:
        raise _damaged(path, error, f": {path.stat().st_size:,} bytes that are not a whole parquet file") from error
    schema = file.schema_arrow
    if text_column not in schema.names:
        raise ConfigError(
            f"{path}: no column {text_column!r}, it has {', '.join(schema.names)}",
            "the documents are read from one column of text",
            "name it with --set corpus.text_column=NAME",
        )
    if schema.names.count(text_column) > 1:
        raise ConfigError(f"{path}: more than one column is named {text_column!r}", "", "rename one")
    kind = schema.field(text_column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise ConfigError(
            f"{path}: column {text_column!r} is {kind}, not text", "", "name another with --set corpus.text_column=NAME"
        )
    return file


def _parquet(path: Path, first: int, last: int, text_column: str) -> Iterator[list[str | None]]:
    file = open_parquet(path, text_column)
    for group in range(first, last):
        try:
            for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[text_column], use_threads=False):
                yield from _bounded(batch.column(0))
        except _DAMAGE as error:
            raise _damaged(path, error, f": row group {group} of {file.num_row_groups}") from error


def _bounded(column: Any) -> Iterator[list[str | None]]:
    """The column's rows, cut where a batch would grow past its bytes."""
    if column.nbytes > BATCH_BYTES and len(column) > 1:
        half = len(column) // 2
        yield from _bounded(column.slice(0, half))
        yield from _bounded(column.slice(half))
        return
    try:
        yield column.to_pylist()
    except UnicodeDecodeError:  # a writer that did not check its strings: decode and mend them one by one
        binary = pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary()
        rows = column.view(binary).to_pylist()
        yield [row if row is None else row.decode("utf-8", "surrogateescape") for row in rows]


def _jsonl(path: Path, first: int, last: int, text_column: str) -> Iterator[str | None]:
    with path.open("rb") as file:
        at = first
        if first:
            file.seek(first - 1)
            at += len(file.readline()) - 1  # the line that crosses into this range belongs to the one before
        while at < last and (line := file.readline()):
            yield _text_of(line, f"{path}: byte {at}", text_column)
            at += len(line)


def _jsonl_gz(path: Path, text_column: str) -> Iterator[str | None]:
    with gzip.open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            yield _text_of(line, f"{path}: line {number}", text_column)


def _damaged(path: Path, error: Exception, where: str) -> MillpondError:
    if isinstance(error, OSError) and error.errno:
        return from_os_error(error, path, "read")
    return CorruptError(
        f"{path}{where}: cannot be read: {error}",
        "the file is damaged or was cut short: most often a download that did not finish",
        "fetch or copy the file again",
    )


def _text_of(line: bytes, place: str, text_column: str) -> str | None:
    try:
        text = line.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
        row = json.loads(text) if text.strip() else {text_column: None}
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{place}: not JSON: {error}", "jsonl has one object a line", "mend that line") from error
    if not isinstance(row, dict) or text_column not in row:
        names = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise ConfigError(
            f"{place}: no field {text_column!r}, it has {names}",
            "the documents are read from one field of text",
            "name it with --set corpus.text_column=NAME",
        )
    text = row[text_column]
    if text is not None and not isinstance(text, str):
        raise ConfigError(f"{place}: field {text_column!r} is {type(text).__name__}, not text", "", "mend that line")
    return text
