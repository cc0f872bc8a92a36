"""What preparing will take, before the first byte: files, tokens, bytes to fetch, bytes of disk."""

import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from prepare.download import Remote, read_range
from prepare.parts import BYTES_PER_TOKEN, ranges_of, text_bytes
from prepare.sources import COMPRESSED_BYTES_PER_TOKEN, FILES_AHEAD, Corpus
from shards.errors import CorruptError, DiskError
from shards.interop import SUFFIXES as TOKEN_SUFFIXES
from shards.manifest import Manifest

FOOTER_GUESS = 1 << 16  # bytes from a parquet file's end that most footers fit in
SIDECAR_BYTES_PER_TOKEN = 0.04  # 16 bytes a document of 400 tokens
AMPLE = 4  # times what is needed by a first guess: no need to look more closely


class Estimate(NamedTuple):
    """About what is to be done. `tokens` are those of the finished folder, `rows` those read for it if footers say so.

    In bytes, and only what is not here yet: `download`, `shards`, and `peak`, all that is needed at once.
    """

    files: int
    rows: int
    tokens: int
    download: int
    shards: int
    peak: int


class _Size(NamedTuple):
    tokens: int
    rows: int
    download: int


def estimate(
    corpus: Corpus, manifest: Manifest, folder: Path, max_tokens: int, *, keep_raw: bool, footers: bool
) -> Estimate:
    """What it takes until `folder` has `max_tokens` (0: the whole corpus).

    With `footers` from those of the parquet files, two requests for each that is not here; else from sizes alone.
    """
    sizes: list[_Size] = []
    with ThreadPoolExecutor(8) as pool:
        wanted = list(pool.map(lambda i: _size_of(corpus, manifest, i, footers=footers), range(corpus.wanted)))
    for i in range(len(corpus.sources)):
        if max_tokens and sum(size.tokens for size in sizes) >= max_tokens:
            break
        sizes.append(wanted[i] if i < len(wanted) else _size_of(corpus, manifest, i, footers=footers))
    tokens = sum(size.tokens for size in sizes)
    if max_tokens:
        tokens = min(tokens, max_tokens + manifest.part_tokens // 2)
    width = 2 if manifest.tokenizer.vocab_size <= 2**16 else 4
    shards = max(0, int(tokens * (width + SIDECAR_BYTES_PER_TOKEN)) - _bytes_in(folder))
    downloads = sorted(size.download for size in sizes)
    kept = sum(downloads) if keep_raw else sum(downloads[-1 - FILES_AHEAD :])
    joined = sum(downloads[-FILES_AHEAD:])  # what several connections brought is joined by copying
    return Estimate(
        files=len(sizes),
        rows=sum(size.rows for size in sizes),
        tokens=tokens,
        download=sum(downloads),
        shards=shards,
        peak=shards + kept + joined,
    )


def require_space(expected: Estimate, home: Path) -> None:
    """DiskError unless `home` has room for what is expected."""
    free = shutil.disk_usage(home).free
    if free < expected.peak:
        raise DiskError(
            f"{home}: this needs about {expected.peak:,} bytes and {free:,} are free",
            f"{expected.shards:,} of them for shards, the rest for source files; nothing was downloaded or changed",
            "free some space, ask for less with --set tokens.max_tokens=N, delete source files once they are "
            "tokenized with --set corpus.keep_raw=false, or choose another disk with --home DIR",
        )


def _size_of(corpus: Corpus, manifest: Manifest, i: int, *, footers: bool) -> _Size:
    """About how many tokens file number `i` has, and what of it is still to be fetched."""
    source, column = corpus.sources[i], manifest.corpus.text_column
    done = [part for part in manifest.parts if part.source == i]
    if done and done[-1].ends_source:
        tokens = sum(part.train.tokens + part.val.tokens for part in done)
        return _Size(tokens, sum(part.counts.rows for part in done), 0)
    place = corpus.glance(i)
    if isinstance(place, Path):
        tokens = sum(tokens for _, _, tokens in ranges_of(place, column, manifest.part_tokens))
        rows = pq.read_metadata(place).num_rows if place.name.endswith(".parquet") else 0
        return _Size(tokens, rows, 0)
    if source.name.endswith(TOKEN_SUFFIXES):
        return _Size(source.nbytes // 2, 0, source.nbytes)
    if source.name.endswith(".parquet") and footers:
        metadata = _remote_footer(place, source.name)
        groups = map(metadata.row_group, range(metadata.num_row_groups))
        text = sum(text_bytes(group, column) for group in groups)
        return _Size(int(text / BYTES_PER_TOKEN), metadata.num_rows, source.nbytes)
    compressed = not source.name.endswith((".jsonl", ".txt"))
    return _Size(int(source.nbytes / (COMPRESSED_BYTES_PER_TOKEN if compressed else BYTES_PER_TOKEN)), 0, source.nbytes)


def _remote_footer(remote: Remote, name: str) -> pq.FileMetaData:
    """The footer of a parquet file that is not here. CorruptError when there is none."""
    tail = read_range(remote, max(0, remote.size - FOOTER_GUESS), remote.size)
    length = struct.unpack("<I", tail[-8:-4])[0] + 8 if len(tail) >= 8 else 0
    if len(tail) < length <= remote.size:
        tail = read_range(remote, remote.size - length, remote.size)
    try:
        return pq.read_metadata(BytesIO(tail))
    except (pa.ArrowException, OSError) as error:
        raise CorruptError(f"{name}: its last {len(tail):,} bytes are no parquet footer: {error}") from error


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.bin")) if folder.exists() else 0
