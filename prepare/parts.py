"""The plan: source files cut into parts of about `part_tokens`, from their footers and sizes alone.

It depends on the files and on `part_tokens` and on nothing else, so every machine and every run plans the same parts.
"""

from collections.abc import Iterator
from pathlib import Path

import msgspec

from prepare.corpora import Corpus
from prepare.documents import Batch, open_parquet, read

BYTES_PER_TOKEN = 4.4  # of English under GPT-2's tokenizer; only the plan depends on it


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Row groups (parquet) or bytes (jsonl) `first` to `last` of source file number `source`.

    `is_final`: nothing comes after it in the whole corpus.
    """

    index: int
    source: int
    path: Path
    first: int
    last: int
    estimated_tokens: int
    is_final: bool


def plan(corpus: Corpus, part_tokens: int) -> Iterator[Part]:
    """Every part of the corpus, in order; a source file is asked for when its first part is.

    ConfigError or CorruptError when a file cannot be one.
    """
    index = 0
    for source in range(len(corpus.sources)):
        path = corpus.path(source)
        ranges = _ranges(path, corpus.record.text_column, int(part_tokens * BYTES_PER_TOKEN))
        for number, (first, last, nbytes) in enumerate(ranges, 1):
            yield Part(
                index=index,
                source=source,
                path=path,
                first=first,
                last=last,
                estimated_tokens=int(nbytes / BYTES_PER_TOKEN),
                is_final=source + 1 == len(corpus.sources) and number == len(ranges),
            )
            index += 1


def read_all(corpus: Corpus, part_tokens: int) -> Iterator[Batch]:
    """Every document of the corpus, in order."""
    for part in plan(corpus, part_tokens):
        yield from read(part.path, part.first, part.last, corpus.record.text_column)


def _ranges(path: Path, text_column: str, part_bytes: int) -> list[tuple[int, int, int]]:
    """(first, last, bytes of text) of each part of one file."""
    if path.name.endswith(".parquet"):
        return _row_groups(path, text_column, part_bytes)
    size = path.stat().st_size
    if path.name.endswith(".jsonl"):
        return [(at, min(at + part_bytes, size), min(part_bytes, size - at)) for at in range(0, size, part_bytes)]
    return [(0, size, size)]  # a stream or a single document cannot be cut


def _row_groups(path: Path, text_column: str, part_bytes: int) -> list[tuple[int, int, int]]:
    metadata = open_parquet(path, text_column).metadata
    ranges: list[tuple[int, int, int]] = []
    first = filled = 0
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        columns = (row_group.column(i) for i in range(row_group.num_columns))
        filled += sum(column.total_uncompressed_size for column in columns if column.path_in_schema == text_column)
        if filled >= part_bytes:
            ranges.append((first, group + 1, filled))
            first, filled = group + 1, 0
    if filled:
        ranges.append((first, metadata.num_row_groups, filled))
    return ranges
