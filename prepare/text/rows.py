"""Files to chunks of rows, column by column: parquet and jsonl a range at a time, other formats whole.

A chunk has at most 1,000 rows and, single rows aside, 4 MiB of text. The formats are in formats.py; whatever a library
raises becomes an error of ours here.
"""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from prepare.text import lines
from prepare.text.columns import no_column, require_columns
from prepare.text.formats import kind_of, unknown
from prepare.text.streams import DAMAGE, opened, refuse_stranger
from shards.errors import ConfigError, CorruptError, HostError, MillpondError, from_os_error

CHUNK_ROWS = 1000
CHUNK_BYTES = 4 << 20
WHOLE = 1 << 62  # the end of a piece that is all of a file

Rows = tuple[Any, ...]  # the text first, an Arrow array or a sequence, then the columns that filters ask for

_DAMAGE = (OSError, EOFError, ValueError, KeyError, MemoryError, pa.ArrowException, *DAMAGE)  # all seen
_MARK = b"\xff\xff\xff\xff"  # before each message of an Arrow stream, but not in the form before Arrow 0.15


class Piece(NamedTuple):
    """Row groups (parquet) or bytes (jsonl) `first` to `last` of a file; other files are read whole."""

    path: Path
    first: int
    last: int


def chunks(pieces: Iterable[Piece], columns: Sequence[str]) -> Iterator[Rows]:
    """The rows of the pieces, in order; those of small files come together.

    `columns`: the text's, then others. A jsonl line belongs to the range its first byte is in. ConfigError when there
    is no such column, CorruptError with the place when the file cannot be read.
    """
    for are_arrow, run in groupby(pieces, lambda piece: kind_of(piece.path.name) in _ARROW):
        if are_arrow:
            for piece in run:
                yield from _converted(_ARROW[kind_of(piece.path.name)](piece, columns), piece.path)
        else:
            yield from _chunked(row for piece in run for row in _converted(_rows(piece, columns), piece.path))


def look(path: Path, columns: Sequence[str]) -> None:
    """Read as little as shows whether the columns are there: ConfigError before other files are read, if not."""
    kind = kind_of(path.name)
    if kind == ".parquet":
        open_parquet(path, columns)
    elif kind in (".csv", ".tsv", ".jsonl"):
        next(_converted(_rows(Piece(path, 0, 1), columns), path), None)
    elif kind == ".arrow":
        next(_converted(_arrow(Piece(path, 0, WHOLE), columns), path), None)


def _rows(piece: Piece, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    path, kind = piece.path, kind_of(piece.path.name)
    if not kind:
        raise unknown("", str(path))
    if path.name.endswith(".jsonl"):
        return lines.jsonl_range(path, piece.first, piece.last, columns)
    return _READERS[kind](path, columns)


def _converted(rows: Iterator[Rows], path: Path) -> Iterator[Rows]:
    try:
        yield from rows
    except _DAMAGE as error:
        raise _damaged(path, error, "") from error


def open_parquet(path: Path, columns: Sequence[str], file: IO[bytes] | None = None) -> pq.ParquetFile:
    """The file, its footer read, its columns found, the first of them text; read from `file` if it is not at `path`."""
    try:
        opened = pq.ParquetFile(file or path, memory_map=False, page_checksum_verification=True)
    except _DAMAGE as error:
        if file is None and path.is_file():
            refuse_stranger(path, None, "parquet")
        size = f"{path.stat().st_size:,} bytes" if file is None and path.is_file() else "bytes"
        raise _damaged(path, error, f": {size} that are not a complete parquet file") from error
    _require_text(opened.schema_arrow, columns, path)
    return opened


def _require_text(schema: pa.Schema, columns: Sequence[str], path: Path) -> None:
    """ConfigError unless the columns are there, the first of them text. One of nulls alone has no type of its own."""
    require_columns(schema.names, columns, str(path))
    kind = schema.field(columns[0]).type
    if not _is_text(kind) and not pa.types.is_null(kind):
        raise ConfigError(
            f"{path}: column {columns[0]!r} is {kind}, not text",
            "",
            "name another with --set corpus.text_column=NAME",
        )


_TEXT = {pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()}


def _is_text(kind: pa.DataType) -> bool:
    """Whether a column holds text, or bytes that a writer did not call text."""
    if isinstance(kind, pa.BaseExtensionType):
        return _is_text(kind.storage_type)
    return _is_text(kind.value_type) if pa.types.is_dictionary(kind) else kind in _TEXT


def _parquet(piece: Piece, columns: Sequence[str]) -> Iterator[Rows]:
    path = piece.path
    file = open_parquet(path, columns)
    if any(pa.types.is_dictionary(file.schema_arrow.field(name).type) for name in columns):
        file = pq.ParquetFile(path, metadata=_plain_metadata(path), memory_map=False, page_checksum_verification=True)
    wanted = list(dict.fromkeys(columns))
    for group in range(piece.first, min(piece.last, file.num_row_groups)):
        try:
            for batch in file.iter_batches(CHUNK_ROWS, row_groups=[group], columns=wanted, use_threads=False):
                yield from _bounded([_flat(batch.column(name)) for name in columns])
        except _DAMAGE as error:
            raise _damaged(path, error, f": row group {group} of {file.num_row_groups}") from error


def _plain_metadata(path: Path) -> pq.FileMetaData:
    """The footer without Arrow's own schema, whose dictionaries are refused when they hold bytes that are not UTF-8."""
    with path.open("rb") as file:
        file.seek(-8, io.SEEK_END)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - length, io.SEEK_END)
        footer = file.read(length + 8)
    return pq.read_metadata(io.BytesIO(b"PAR1" + footer.replace(b"ARROW:schema", b"arrow schema")))


def _arrow(piece: Piece, columns: Sequence[str]) -> Iterator[Rows]:
    """The rows of an Arrow file in either of its forms, as `datasets` and Arrow's own writers make them."""
    path = piece.path
    with pa.OSFile(str(path), "rb") as file:
        head = file.read(6)
        if head != b"ARROW1":
            refuse_stranger(path, None, "arrow")
            end = (_MARK if head.startswith(_MARK) else b"") + b"\0\0\0\0"  # zeros alone also end a batch
            file.seek(max(0, file.size() - len(end)))
            if file.read() != end:
                raise CorruptError(
                    f"{path}: {file.size():,} bytes of an incomplete Arrow stream: the mark at its end is missing",
                    "text after that place would be missing from the corpus: most often a copy that did not finish",
                    "fetch or copy the file again",
                )
        file.seek(0)
        reader = pa.ipc.open_file(file) if head == b"ARROW1" else pa.ipc.open_stream(file)
        _require_text(reader.schema, columns, path)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if head == b"ARROW1" else reader
        for batch in batches:
            whole = [_checked(batch.column(name)) for name in columns]
            for at in range(0, batch.num_rows, CHUNK_ROWS):
                yield from _bounded([_flat(column.slice(at, CHUNK_ROWS)) for column in whole])


def _checked(column: pa.Array) -> pa.Array:
    """The column; ArrowInvalid when it leads outside of its own memory, which nothing in Arrow looks at. Its UTF-8 is
    not checked: that is repaired."""
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        _checked(column.storage)
    elif pa.types.is_dictionary(kind):
        column.indices.validate(full=True)
        pa.DictionaryArray.from_arrays(column.indices, _checked(column.dictionary), safe=True)
    elif kind == pa.string_view():
        column.cast(pa.binary_view()).validate(full=True)
    else:
        column.view(_AS_BYTES.get(kind, kind)).validate(full=True)
    return column


_AS_BYTES = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}


def _bounded(columns: list[Any]) -> Iterator[Rows]:
    """The columns' rows, cut where a chunk would grow past its bytes."""
    text = columns[0]
    if _nbytes(text) > CHUNK_BYTES and len(text) > 1:
        half = len(text) // 2
        yield from _bounded([column.slice(0, half) for column in columns])
        yield from _bounded([column.slice(half) for column in columns])
        return
    yield plain(text), *(as_list(plain(column)) for column in columns[1:])


def _nbytes(column: pa.Array) -> int:
    """The bytes of a column's rows. A slice of a dictionary column has the whole dictionary with it."""
    if not pa.types.is_dictionary(column.type) or column.nbytes <= CHUNK_BYTES:
        return int(column.nbytes)
    if not _is_text(column.type):
        return 0
    lengths = pc.binary_length(_flat(column.dictionary)).take(column.indices)
    return int(pc.sum(lengths).as_py() or 0)


def _flat(column: pa.Array) -> pa.Array:
    """Text of any type, dictionaries aside, as string or large_string, whose UTF-8 is not checked here."""
    kind = column.type
    if not _is_text(kind) or kind in (pa.string(), pa.large_string()):
        return column
    if isinstance(kind, pa.BaseExtensionType):
        return _flat(column.storage)
    if pa.types.is_dictionary(kind):
        return column
    return column.view(pa.string()) if kind == pa.binary() else column.cast(pa.large_binary()).view(pa.large_string())


def plain(column: pa.Array) -> pa.Array:
    """The column without a dictionary."""
    if not pa.types.is_dictionary(column.type):
        return column
    return _flat(column.dictionary).take(column.indices)


def as_list(column: pa.Array) -> list[Any]:
    """The column's values; bytes of text that are not UTF-8 as lone surrogates."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:  # a writer that did not check its strings
        kind = pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary()
        rows = column.view(kind).to_pylist()
        return [row if row is None else row.decode("utf-8", "surrogateescape") for row in rows]


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


def _document(path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """A file that is one document."""
    if len(columns) > 1:
        raise no_column(f"{path}: no column {columns[1]!r}, a text file has none", is_text=False)
    with opened(path) as file:
        yield (file.read().decode("utf-8-sig", "surrogateescape"),)


_ARROW = {".parquet": _parquet, ".arrow": _arrow}
_READERS: dict[str, Callable[[Path, Sequence[str]], Iterator[tuple[Any, ...]]]] = {
    ".jsonl": lines.jsonl,
    ".json": lines.json_rows,
    ".csv": lines.csv_rows,
    ".tsv": lines.csv_rows,
    ".txt": _document,
    ".md": _document,
}


def _damaged(path: Path, error: Exception, where: str) -> MillpondError:
    if isinstance(error, MemoryError):
        return HostError(
            f"{path}{where}: memory ran out while it was read{f' ({error})' if str(error) else ''}",
            "it is read in pieces, but one row group, row or file of text must fit",
            "use fewer workers with --set tokens.workers=1, or a machine with more memory",
        )
    if isinstance(error, OSError) and error.errno:
        return from_os_error(error, path, "read")
    if isinstance(error, NotImplementedError | pa.ArrowCapacityError):
        return ConfigError(
            f"{path}{where}: pyarrow {pa.__version__} cannot read it: {error}",
            "the file may be sound, and have something in it that pyarrow does not know",
            "write it again with plain columns, or as .jsonl",
        )
    return CorruptError(
        f"{path}{where}: cannot be read: {error}",
        "the file is damaged or was cut short: most often a download that did not finish",
        "fetch or copy the file again",
    )
