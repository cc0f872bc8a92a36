"""The plan: source files cut into parts of about `part_tokens`, from their footers and sizes.

It depends on the files, on `part_tokens` and on a sample of the text, and on nothing else, so every machine and every
run plans the same parts.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, assert_never

import msgspec

from prepare.corpus.corpus import Corpus
from prepare.text.documents import TextBatch, read, read_pieces
from prepare.text.filters import Filter
from prepare.text.formats import bytes_per_token, cut_of, kind_of
from prepare.text.rows import WHOLE, Piece, open_parquet
from shards.header import MAX_FILE_BYTES
from shards.interop import SUFFIXES as TOKEN_SUFFIXES
from shards.interop import token_bytes
from shards.manifest import CutRecord, PartRecord, SourceRecord, Split
from shards.tokenizer import Tokenizer

BYTES_PER_TOKEN = 4.4  # of English under GPT-2's tokenizer; only the plan depends on it
ENGLISH = 1000  # a plan's scale where nothing was measured
SAMPLE_BYTES = 1 << 20
SMALL, RUN = 100, 8  # small files, and runs of them, in a part
OFFSET_BYTES = 4  # with each text in a parquet file
_PIECE = 4096  # characters


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes one train shard and one val shard: of source file number `source` the row groups (parquet), tokens
    (ready ones) or bytes (all others) `first` to `last`; or all of the files up to `last_source`.

    `ends_source`: nothing of the file comes after it.
    """

    index: int
    source: int
    last_source: int | None = None
    pieces: tuple[Piece, ...]
    first: int
    last: int
    ends_source: bool
    estimated_tokens: int
    split: Split | None = None

    @property
    def path(self) -> Path:
        """The file, or the first of them."""
        return self.pieces[0].path


def plan_parts(
    corpus: Corpus, part_tokens: int, sealed: Mapping[int, PartRecord] | None = None, cut: CutRecord | None = None
) -> Iterator[Part]:
    """Every part of the corpus, in order, but those that are `sealed`, by number.

    With a `cut`, which says how, neighbours that are small are one part. A source file is asked for when its
    part is; one whose parts are all sealed never. A file without rows is one part. ConfigError or CorruptError when a
    file cannot be one.
    """
    sealed = sealed or {}
    index, done = 0, -1  # the number of the part, and the last source that is in a part
    for source, record in enumerate(corpus.sources):
        if not record.has_parts or source <= done:
            continue
        if (after := _sealed_until(sealed, index, source)) is not None:
            index, done = after, sealed[after - 1].sources[-1]
            continue
        run = _run_of_small(corpus, source, part_tokens, cut) if cut else [source]
        done = run[-1]
        if cut and len(run) > 1:
            yield Part(
                index=index,
                source=source,
                last_source=done,
                pieces=tuple(Piece(corpus.path(i), 0, WHOLE) for i in run),
                first=0,
                last=0,
                ends_source=True,
                estimated_tokens=sum(_tokens_of(corpus.sources[i], cut) for i in run),
                split=record.split,
            )
            index += 1
            continue
        path = corpus.path(source)
        ranges = ranges_of(path, corpus.record.text_column, part_tokens, cut.scale if cut else ENGLISH)
        for first, last, tokens in ranges:
            if index not in sealed:
                yield Part(
                    index=index,
                    source=source,
                    pieces=(Piece(path, first, last),),
                    first=first,
                    last=last,
                    ends_source=last == ranges[-1][1],
                    estimated_tokens=tokens,
                    split=record.split,
                )
            index += 1


def joins_or_cuts(sources: Sequence[SourceRecord], part_tokens: int) -> bool:
    """Whether the files, by their names and sizes, may be joined or cut: else each is one part in every plan."""
    several = Counter(source.split for source in sources if _is_text(source))
    return any(count > 1 for count in several.values()) or any(
        _is_text(source) and cut_of(source.name) != "never" and source.nbytes > part_tokens for source in sources
    )


def cut_by_sample(corpus: Corpus, tokenizer: Tokenizer, filters: Sequence[Filter] = ()) -> CutRecord:
    """How to cut the corpus, by how many bytes of its first MiB of text become one token."""
    column, nbytes, tokens = corpus.record.text_column, 0, 0
    packed = float(ENGLISH)
    for source, record in enumerate(corpus.sources):
        if record.split == "val" or not _is_text(record):
            continue
        path, cut = corpus.path(source), cut_of(record.name)
        if cut == "row groups":
            metadata = open_parquet(path, [column]).metadata
            groups = [text_bytes(metadata.row_group(i), column) for i in range(metadata.num_row_groups)]
            samples = [(Piece(path, i, i + 1), size) for i, size in enumerate(groups)]
        else:
            last = min(record.nbytes, SAMPLE_BYTES) if cut == "bytes" else WHOLE
            samples = [(Piece(path, 0, last), last)]
        for piece, size in samples:
            text, found, whole = _sampled(piece, column, tokenizer, filters)
            nbytes += size if whole and cut != "never" else text
            tokens += found
            if nbytes >= SAMPLE_BYTES:
                break
        if cut == "row groups" and tokens:
            packed = ENGLISH * record.nbytes / max(1, sum(groups)) * nbytes / tokens / bytes_per_token(record.name)
        if nbytes >= SAMPLE_BYTES or cut != "never":  # another file may be large, far away, and never needed
            break
    return CutRecord(scale=scale_of(nbytes, tokens), packed=min(max(round(packed), 1), 10**6))


def scale_of(nbytes: int, tokens: int) -> int:
    """The scale of a plan in which so many bytes of text become so many tokens."""
    return min(max(round(ENGLISH * nbytes / tokens / BYTES_PER_TOKEN), 1), 10**6) if tokens else ENGLISH


def _sampled(piece: Piece, column: str, tokenizer: Tokenizer, filters: Sequence[Filter]) -> tuple[int, int, bool]:
    """The bytes of text, of them at most a few MiB, that pass the filters, their tokens, and whether that was all."""
    nbytes = tokens = 0
    for batch in read(*piece, column, filters):
        tokens += sum(1 + len(tokenizer.encode(part)) for text in batch.texts for part in _short(text))
        nbytes += batch.counts.text_bytes + OFFSET_BYTES * len(batch.texts)
        if nbytes >= SAMPLE_BYTES:
            return nbytes, tokens, False
    return nbytes, tokens, True


def _run_of_small(corpus: Corpus, source: int, part_tokens: int, cut: CutRecord) -> list[int]:
    """`source` and the small files after it that are one part with it, by their sizes alone.

    Small is a hundredth of a part. The run ends at an eighth of one, so that several workers have something to do.
    """
    first, run, filled = corpus.sources[source], [source], 0
    for i, record in enumerate(corpus.sources[source:], source):
        tokens = _tokens_of(record, cut)
        filled += tokens
        if not _is_text(record) or record.split != first.split or tokens * SMALL > part_tokens:
            break
        if i > source and filled * RUN > part_tokens:
            break
        if i > source:
            run.append(i)
    return run


def _tokens_of(record: SourceRecord, cut: CutRecord) -> int:
    """About how many tokens are in a file of text, from its name and size."""
    scale = cut.packed if cut_of(record.name) == "row groups" else cut.scale
    return int(ENGLISH * record.nbytes / bytes_per_token(record.name) / scale) if _is_text(record) else 0


def _short(text: str) -> Iterator[str]:
    """The text in pieces, since the reference engine takes the square of the length of a word."""
    return (text[at : at + _PIECE] for at in range(0, min(len(text), SAMPLE_BYTES), _PIECE))


def _is_text(record: SourceRecord) -> bool:
    return bool(kind_of(record.name))


def read_all(corpus: Corpus, part_tokens: int, filters: Sequence[Filter] = ()) -> Iterator[TextBatch]:
    """Every document of the corpus that passes the filters, in order."""
    for part in plan_parts(corpus, part_tokens):
        yield from read_pieces(part.pieces, corpus.record.text_column, filters)


def ranges_of(path: Path, text_column: str, part_tokens: int, scale: int = ENGLISH) -> list[tuple[int, int, int]]:
    """(first, last, about how many tokens) of each part of one file, at least one."""
    bytes_a_token = BYTES_PER_TOKEN * scale / ENGLISH
    part_bytes = int(part_tokens * bytes_a_token)
    size = path.stat().st_size
    if path.name.endswith(TOKEN_SUFFIXES):
        tokens = size // token_bytes(path)
        step = part_tokens if size > MAX_FILE_BYTES else tokens  # what fits one shard stays one
        cuts = [(at, at + step) for at in range(0, tokens, max(1, step))] or [(0, 0)]
        return [(first, last, last - first) for first, last in cuts]
    match cut := cut_of(path.name):
        case "row groups":
            return _row_groups(path, text_column, part_bytes, bytes_a_token)
        case "bytes" if size:
            cuts = [(at, min(at + part_bytes, size)) for at in range(0, size, part_bytes)]
            return [(first, last, int((last - first) / bytes_a_token)) for first, last in cuts]
        case "bytes" | "never":  # a stream or a single document cannot be cut
            return [(0, size, int(size / bytes_a_token))]
        case _:
            assert_never(cut)


def text_bytes(row_group: Any, text_column: str) -> int:
    """The uncompressed bytes of a parquet row group's text, from the footer."""
    columns = (row_group.column(i) for i in range(row_group.num_columns))
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == text_column)


def _row_groups(path: Path, text_column: str, part_bytes: int, bytes_a_token: float) -> list[tuple[int, int, int]]:
    metadata = open_parquet(path, [text_column]).metadata
    ranges: list[tuple[int, int, int]] = []
    first = filled = 0
    for group in range(metadata.num_row_groups):
        filled += text_bytes(metadata.row_group(group), text_column)
        if filled >= part_bytes:
            ranges.append((first, group + 1, int(filled / bytes_a_token)))
            first, filled = group + 1, 0
    if first < metadata.num_row_groups or not ranges:
        ranges.append((first, metadata.num_row_groups, int(filled / bytes_a_token)))
    return ranges


def _sealed_until(sealed: Mapping[int, PartRecord], index: int, source: int) -> int | None:
    """The number after the source's last part, when all its parts, from `index` on, are sealed."""
    while index in sealed and sealed[index].source == source:
        if sealed[index].ends_source:
            return index + 1
        index += 1
    return None
