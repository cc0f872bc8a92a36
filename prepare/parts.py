"""The plan: source files cut into parts of about `part_tokens`, from their footers and sizes alone.

It depends on the files and on `part_tokens` and on nothing else, so every machine and every run plans the same parts.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from prepare.documents import Batch, read
from prepare.formats import cut_of
from prepare.rows import open_parquet
from prepare.screen import Filter
from prepare.sources import Corpus
from shards.header import MAX_FILE_BYTES
from shards.interop import SUFFIXES as TOKEN_SUFFIXES
from shards.interop import token_bytes
from shards.manifest import PartRecord, Split

BYTES_PER_TOKEN = 4.4  # of English under GPT-2's tokenizer; only the plan depends on it


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Row groups (parquet), tokens (ready ones), bytes (all others) `first` to `last` of source file number `source`.

    `ends_source`: nothing of the file comes after it.
    """

    index: int
    source: int
    path: Path
    first: int
    last: int
    ends_source: bool
    estimated_tokens: int
    split: Split | None = None


def plan(corpus: Corpus, part_tokens: int, sealed: Mapping[int, PartRecord] | None = None) -> Iterator[Part]:
    """Every part of the corpus, in order, but those that are `sealed`, by number.

    A source file is asked for when its first part is; one whose parts are all sealed never. A file without rows is one
    part. ConfigError or CorruptError when a file cannot be one.
    """
    sealed = sealed or {}
    index = 0
    for source, record in enumerate(corpus.sources):
        if not record.has_parts:
            continue
        if (after := _sealed_until(sealed, index, source)) is not None:
            index = after
            continue
        path = corpus.path(source)
        ranges = ranges_of(path, corpus.record.text_column, part_tokens)
        for first, last, tokens in ranges:
            if index not in sealed:
                yield Part(
                    index=index,
                    source=source,
                    path=path,
                    first=first,
                    last=last,
                    ends_source=last == ranges[-1][1],
                    estimated_tokens=tokens,
                    split=record.split,
                )
            index += 1


def read_all(corpus: Corpus, part_tokens: int, filters: Sequence[Filter] = ()) -> Iterator[Batch]:
    """Every document of the corpus that passes the filters, in order."""
    for part in plan(corpus, part_tokens):
        yield from read(part.path, part.first, part.last, corpus.record.text_column, filters)


def ranges_of(path: Path, text_column: str, part_tokens: int) -> list[tuple[int, int, int]]:
    """(first, last, about how many tokens) of each part of one file, at least one."""
    part_bytes = int(part_tokens * BYTES_PER_TOKEN)
    size = path.stat().st_size
    if cut_of(path.name) == "row groups":
        return _row_groups(path, text_column, part_bytes)
    if cut_of(path.name) == "bytes" and size:
        cuts = [(at, min(at + part_bytes, size)) for at in range(0, size, part_bytes)]
        return [(first, last, int((last - first) / BYTES_PER_TOKEN)) for first, last in cuts]
    if path.name.endswith(TOKEN_SUFFIXES):
        tokens = size // token_bytes(path)
        step = part_tokens if size > MAX_FILE_BYTES else tokens  # what fits one shard stays one
        cuts = [(at, at + step) for at in range(0, tokens, max(1, step))] or [(0, 0)]
        return [(first, last, last - first) for first, last in cuts]
    return [(0, size, int(size / BYTES_PER_TOKEN))]  # a stream or a single document cannot be cut


def text_bytes(row_group: Any, text_column: str) -> int:
    """The uncompressed bytes of a parquet row group's text, from the footer."""
    columns = (row_group.column(i) for i in range(row_group.num_columns))
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == text_column)


def _row_groups(path: Path, text_column: str, part_bytes: int) -> list[tuple[int, int, int]]:
    metadata = open_parquet(path, [text_column]).metadata
    ranges: list[tuple[int, int, int]] = []
    first = filled = 0
    for group in range(metadata.num_row_groups):
        filled += text_bytes(metadata.row_group(group), text_column)
        if filled >= part_bytes:
            ranges.append((first, group + 1, int(filled / BYTES_PER_TOKEN)))
            first, filled = group + 1, 0
    if first < metadata.num_row_groups or not ranges:
        ranges.append((first, metadata.num_row_groups, int(filled / BYTES_PER_TOKEN)))
    return ranges


def _sealed_until(sealed: Mapping[int, PartRecord], index: int, source: int) -> int | None:
    """The number after the source's last part, when all its parts, from `index` on, are sealed."""
    while index in sealed and sealed[index].source == source:
        if sealed[index].ends_source:
            return index + 1
        index += 1
    return None
