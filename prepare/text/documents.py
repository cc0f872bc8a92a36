"""Rows to batches of clean text. A row is a document, or it is counted as dropped, and why; nothing disappears.

No normalisation: a document is kept byte for byte. Only what UTF-8 cannot hold becomes U+FFFD, and is counted.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from prepare.text.filters import LENGTH, Filter, HashFilter
from prepare.text.rows import Piece, Rows, as_list, chunks
from shards.manifest import Counts
from shards.tokenizer import EOT_TEXT

_SURROGATE = re.compile("[\ud800-\udfff]")  # a lone half of a UTF-16 pair, or (escaped so) a byte that is not UTF-8


class TextBatch(NamedTuple):
    """At most 1,000 documents and, single documents aside, 4 MiB: `texts`, and `hashes`, the xxh3-64 of their UTF-8."""

    texts: list[str]
    hashes: NDArray[np.uint64]
    counts: Counts


def read(
    path: Path,
    first: int,
    last: int,
    text_column: str,
    filters: Sequence[Filter] = (),
    hash_filter: HashFilter | None = None,
) -> Iterator[TextBatch]:
    """The documents of a range of a file, as rows.chunks reads it, that pass the filters and then the hash filter."""
    return read_pieces([Piece(path, first, last)], text_column, filters, hash_filter)


def read_pieces(
    pieces: Iterable[Piece], text_column: str, filters: Sequence[Filter] = (), hash_filter: HashFilter | None = None
) -> Iterator[TextBatch]:
    """The documents of ranges of several files, one after another."""
    columns = [text_column, *(filter.column for filter in filters if filter.column != LENGTH)]
    for rows in chunks(pieces, columns):
        yield clean(rows, filters, hash_filter)


def clean(rows: Rows, filters: Sequence[Filter] = (), hash_filter: HashFilter | None = None) -> TextBatch:
    """Drop what is empty or unwanted, repair what UTF-8 cannot hold, hash, and count it all."""
    (everything, utf8), others = _texts(rows[0]), iter(rows[1:])
    kept = [i for i, text in enumerate(everything) if text]
    dropped = {"null": everything.count(None)}
    dropped["empty"] = len(everything) - len(kept) - dropped["null"]
    for filter in filters:
        values = [*map(len, (text or "" for text in everything))] if filter.column == LENGTH else next(others)
        keeps = filter.keeps([values[i] for i in kept])
        reason = f"not {filter.text}"
        dropped[reason] = dropped.get(reason, 0) + int(np.count_nonzero(~keeps))
        kept = [i for i, keep in zip(kept, keeps.tolist(), strict=True) if keep]
    texts, repaired = [everything[i] for i in kept], np.zeros(len(kept), np.bool_)
    try:
        data = [utf8[i] for i in kept] if utf8 else [text.encode() for text in texts]
    except UnicodeEncodeError:
        mended = [_SURROGATE.sub("\ufffd", text) for text in texts]
        repaired = np.array([before != after for before, after in zip(texts, mended, strict=True)], np.bool_)
        texts, data = mended, [text.encode() for text in mended]
    hashes = np.fromiter(map(xxhash.xxh3_64_intdigest, data), np.uint64, len(data))
    if hash_filter is not None:
        out = np.zeros(len(texts), np.bool_)
        for reason, drops in hash_filter(hashes):
            dropped[reason] = int(np.count_nonzero(drops))
            out |= drops
        stays = np.flatnonzero(~out)
        texts, data = [texts[i] for i in stays], [data[i] for i in stays]
        hashes, repaired = hashes[stays], repaired[stays]
    counts = Counts(
        rows=len(everything),
        dropped={reason: count for reason, count in dropped.items() if count},
        repaired=int(np.count_nonzero(repaired)),
        literal_eot=sum("|" in text and EOT_TEXT in text for text in texts),  # one character is found far sooner
        text_bytes=sum(map(len, data)),
    )
    return TextBatch(texts, hashes, counts)


def _texts(column: Any) -> tuple[Sequence[Any], list[memoryview] | None]:
    """A column's text, and its UTF-8 where Arrow holds that in one buffer: hashed there, it is not encoded again."""
    if not isinstance(column, pa.Array):
        return column, None
    kind = column.type
    try:
        texts = column.to_pylist()
    except UnicodeDecodeError:
        return as_list(column), None
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)) or not any(texts):
        return texts, None
    _, offsets, utf8 = column.buffers()
    width = np.dtype("<i4" if pa.types.is_string(kind) else "<i8")
    ends = np.frombuffer(offsets, width, len(column) + 1, column.offset * width.itemsize).tolist()
    whole = memoryview(utf8)
    return texts, [whole[first:last] for first, last in pairwise(ends)]
