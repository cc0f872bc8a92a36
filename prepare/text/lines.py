"""Rows of jsonl, json, csv and tsv files, in the order of the file. Bytes that are not UTF-8 become lone surrogates,
which documents.py repairs and counts."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prepare.text.columns import Repeated, Spelled, require_columns, values
from prepare.text.streams import opened, refuse_stranger
from shards.errors import CorruptError

Cells = tuple[Any, ...]
BOM = "\ufeff"


def jsonl_range(path: Path, first: int, last: int, columns: Sequence[str]) -> Iterator[Cells]:
    """The lines of an uncompressed file whose first byte is in `first` to `last`."""
    refuse_stranger(path)
    with path.open("rb") as file:
        at = first
        if first:
            file.seek(first - 1)
            at += len(file.readline()) - 1  # the line that crosses into this range belongs to the one before
        while at < last and (line := file.readline()):
            yield from _parsed(line, f"{path}: byte {at}", columns)
            at += len(line)


def jsonl(path: Path, columns: Sequence[str]) -> Iterator[Cells]:
    """One object a line."""
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            yield from _parsed(line, f"{path}: line {number}", columns)


def json_rows(path: Path, columns: Sequence[str]) -> Iterator[Cells]:
    """One array of objects, or one object a line."""
    with opened(path) as file:
        start = file.read(1 << 10)
        while start.isspace() and (more := file.read(1 << 10)):
            start += more
        if not start.removeprefix(BOM.encode()).lstrip().startswith(b"["):
            yield from jsonl(path, columns)
            return
        text = (start + file.read()).decode("utf-8-sig", "surrogateescape")
    try:
        rows = _decode(text)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path}: not JSON: {error}", "it is one array of objects", "fix it") from error
    for number, row in enumerate(rows, 1):
        yield values(row, f"{path}: object {number}", columns)


def csv_rows(path: Path, columns: Sequence[str]) -> Iterator[Cells]:
    """Fields as they are spelled, quoted as in RFC 4180, in a tsv file too; an empty field is null.

    CorruptError with its line for a row that is longer or shorter than the header.
    """
    csv.field_size_limit(1 << 30)
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    with io.TextIOWrapper(opened(path), "utf-8-sig", "surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        names: list[str] = []
        text, others, at = 0, list[int](), 1
        try:
            for row in reader:
                if row and not names:
                    names = row
                    require_columns(names, columns, str(path))
                    text, *others = (names.index(name) for name in columns)
                elif row:
                    if len(row) != len(names):
                        raise _uneven(path, at, len(row), len(names))
                    yield row[text] or None, *(Spelled(row[i]) if row[i] else None for i in others)
                at = reader.line_num + 1
        except csv.Error as error:
            raise CorruptError(
                f"{path}: line {at}: {error}",
                "a field that begins with a quote ends with one, and a quote inside it is doubled",
                "fix that line, or write the file again with a csv library",
            ) from error


def _uneven(path: Path, line: int, found: int, expected: int) -> CorruptError:
    return CorruptError(
        f"{path}: line {line}: {found} fields, the header has {expected}",
        "text would be read from the wrong column",
        "fix that line: a field with a delimiter or a line break in it is put in quotes",
    )


def _parsed(line: bytes, place: str, columns: Sequence[str]) -> list[Cells]:
    """The row of a line, or the rows: a lone carriage return can be inside no value, so it may end lines as well."""
    text = line.decode("utf-8", "surrogateescape").removeprefix(BOM)
    if not text.strip():
        return [(None,) * len(columns)]
    try:
        return [values(_decode(text), place, columns)]
    except (ValueError, RecursionError) as error:
        if b"\r" in line.strip():
            pieces = filter(None, line.strip().split(b"\r"))
            return [row for i, piece in enumerate(pieces, 1) for row in _parsed(piece, f"{place}, row {i}", columns)]
        raise CorruptError(f"{place}: {_why(error)}", "jsonl has one object a line", "fix that line") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """What the decoder makes of an object: a name that is in it twice is not forgotten."""
    row = dict(pairs)
    if len(row) == len(pairs):
        return row
    names = [name for name, _ in pairs]
    return Repeated(row, frozenset(name for name in row if names.count(name) > 1))


_decode = json.JSONDecoder(object_pairs_hook=_object).decode


def _why(error: ValueError | RecursionError) -> str:
    """What is wrong with a line of JSON, and in which of its columns: the decoder calls each of them line 1."""
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg}, column {error.colno} of the line that begins there"
    return f"not JSON: {error}"
