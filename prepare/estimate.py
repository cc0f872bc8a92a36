"""What preparing will take, before the first byte: files, tokens, bytes to fetch, bytes of disk."""

import shutil
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from prepare.corpus.corpus import FILES_AHEAD, Corpus
from prepare.corpus.download import Remote
from prepare.corpus.remote_file import RemoteFile, transfer_rate
from prepare.part_builder import Builder, FolderSpec
from prepare.parts import BYTES_PER_TOKEN, ENGLISH, OFFSET_BYTES, SAMPLE_BYTES, Part, ranges_of, scale_of, text_bytes
from prepare.text.documents import clean, read
from prepare.text.formats import bytes_per_token
from prepare.text.rows import Piece, open_parquet
from prepare.tokens import vocabulary
from prepare.tokens.encode import EngineName
from shards.errors import CorruptError, DiskError, RefusedError
from shards.interop import SUFFIXES as TOKEN_SUFFIXES
from shards.manifest import CorpusRecord, Manifest, PartRecord, SourceRecord
from shards.tokenizer import Tokenizer

SIDECAR_BYTES_PER_TOKEN = 0.04  # 16 bytes a document of 400 tokens
SAMPLE_TOKENS = 2_000_000
SAMPLE_FILE_BYTES = 8 << 20
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


class Target(NamedTuple):
    """What is to be made: `folder`, with `done` in it, of so many tokens (0: the whole corpus), each `width` bytes.

    `scale` is how many bytes of text become one token, in thousandths of what English takes under GPT-2's tokenizer.
    """

    folder: Path
    done: list[PartRecord]
    part_tokens: int
    max_tokens: int
    width: int
    keep_raw: bool
    scale: int


def estimate(corpus: Corpus, target: Target, *, footers: bool) -> Estimate:
    """What it takes until the folder holds what `target` says.

    With `footers` from those of the parquet files, two requests for each that is not here; else from sizes alone.
    """
    sizes: list[_Size] = []
    stop = threading.Event()
    with ThreadPoolExecutor(8) as pool:
        try:
            first = list(pool.map(lambda i: _size_of(corpus, target, i, footers, stop), range(corpus.needed)))
        finally:
            stop.set()  # on Ctrl-C none of them is waited for
    counted = 0  # towards max_tokens
    for i, source in enumerate(corpus.sources):
        if target.max_tokens and counted >= target.max_tokens:
            break
        sizes.append(first[i] if i < len(first) else _size_of(corpus, target, i, footers, threading.Event()))
        counted += sizes[-1].tokens * (source.split != "val")
    tokens = sum(size.tokens for size in sizes)
    if target.max_tokens and not corpus.sources[0].split:
        tokens = min(tokens, target.max_tokens + target.part_tokens // 2)
    done = sum(part.tokens for part in target.done)
    sealed = sum(path.stat().st_size for path in target.folder.glob("*-?????.*")) if tokens > done else sys.maxsize
    shards = max(0, int(tokens * (target.width + SIDECAR_BYTES_PER_TOKEN)) - sealed)
    downloads = sorted(size.download for size in sizes)
    kept = sum(downloads) if target.keep_raw else sum(downloads[-1 - FILES_AHEAD :])
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


def sample(corpus: Corpus) -> list[str]:
    """Some documents of the first file of text, here or remote: at most two row groups or 8 MiB of it are fetched."""
    column = corpus.record.text_column
    i = next((i for i, source in enumerate(corpus.sources) if source.has_parts and source.split != "val"), 0)
    place, name = corpus.glance(i), corpus.sources[i].name
    if name.endswith(TOKEN_SUFFIXES):
        return []
    if isinstance(place, Path):
        first, last, _ = ranges_of(place, column, SAMPLE_TOKENS)[0]
        return [text for batch in islice(read(place, first, last, column), 4) for text in batch.texts]
    if name.endswith(".parquet"):
        file = open_parquet(Path(name), [column], RemoteFile(place))
        table = file.read_row_groups(list(range(min(2, file.num_row_groups))), columns=[column])
        return [text for batch in table.to_batches(1000) for text in clean((batch.column(0),)).texts]
    texts: list[str] = []
    with tempfile.TemporaryDirectory() as temp:
        path = Path(temp, Path(name).name)
        path.write_bytes(RemoteFile(place).read(SAMPLE_FILE_BYTES))
        try:
            for batch in read(path, 0, path.stat().st_size, column):
                texts += batch.texts
        except CorruptError:  # where the bytes end, in the middle of a row
            pass
    return texts


def measured_scale(tokenizer: Tokenizer, texts: list[str]) -> int:
    """How many bytes of the first MiB of `texts` become one token, as Target has it."""
    nbytes = tokens = 0
    for text in texts:
        nbytes += len(text.encode()) + OFFSET_BYTES
        tokens += 1 + len(tokenizer.encode(text))
        if nbytes >= SAMPLE_BYTES:
            break
    return scale_of(nbytes, tokens)


def vocabulary_of(vocab_size: int, texts: list[str]) -> tuple[Tokenizer, float] | None:
    """A vocabulary trained on `texts`, and about the seconds it takes on as much text as a real one is trained on.

    None when they are too few for one so large.
    """
    batch, began = clean((texts,)), time.perf_counter()
    try:
        tokenizer = vocabulary.train_bpe([batch], vocab_size)
    except RefusedError:
        return None
    seconds = time.perf_counter() - began
    return tokenizer, seconds * max(1.0, vocabulary.TRAINING_BYTES / batch.counts.text_bytes)


def download_rate(corpus: Corpus) -> float | None:
    """Bytes a second that come of the first file that is not here; None when all are."""
    places = (corpus.glance(i) for i, source in enumerate(corpus.sources) if source.has_parts)
    remote = next((place for place in places if isinstance(place, Remote)), None)
    return transfer_rate(remote) if remote else None


def rate_of(tokenizer: Tokenizer, texts: list[str], engine: EngineName) -> float:
    """Tokens a second of one worker, parquet in, sealed shards out, measured on the second half of `texts`: the engine
    starts on the first, and is faster on words that it has seen."""
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        (folder / ".parts").mkdir()
        pq.write_table(pa.table({"text": texts}), folder / "sample.parquet", row_group_size=max(1, len(texts) // 2))
        manifest = Manifest(
            fingerprint="0" * 64,
            corpus=CorpusRecord(kind="files", name="sample", text_column="text", details={}),
            sources=[SourceRecord(name="sample.parquet", nbytes=0, digest="sha256:" + "0" * 64)],
            tokenizer=vocabulary.save(tokenizer, folder),
            placement="before",
            val_fraction=0.005,
            part_tokens=SAMPLE_TOKENS,
            parts=[],
        )
        builder = Builder(FolderSpec(folder=folder, manifest=manifest, engine=engine), lambda _: None)
        halves = [(Piece(folder / "sample.parquet", *groups),) for groups in ((0, 1), (1, 2) if texts[1:] else (0, 1))]
        part = Part(index=0, source=0, pieces=halves[0], first=0, last=1, ends_source=True, estimated_tokens=0)
        builder.build(part)
        began = time.perf_counter()
        record = builder.build(msgspec.structs.replace(part, index=1, pieces=halves[1]))
        return record.tokens / (time.perf_counter() - began)


def _size_of(corpus: Corpus, target: Target, i: int, footers: bool, stop: threading.Event) -> _Size:
    """About how many tokens file number `i` has, and what of it is still to be fetched."""
    source, column = corpus.sources[i], corpus.record.text_column
    done = [part for part in target.done if i in part.sources]
    if done and done[-1].ends_source:
        own = [part for part in done if part.source == i]  # those of several files count with the first
        return _Size(sum(part.tokens for part in own), sum(part.counts.rows for part in own), 0)
    if not source.has_parts:
        return _Size(0, 0, 0)
    place = corpus.glance(i)
    if isinstance(place, Path):
        tokens = sum(tokens for _, _, tokens in ranges_of(place, column, target.part_tokens, target.scale))
        rows = open_parquet(place, [column]).metadata.num_rows if place.name.endswith(".parquet") else 0
        return _Size(tokens, rows, 0)
    if source.name.endswith(TOKEN_SUFFIXES):
        return _Size(source.nbytes // 2, 0, source.nbytes)
    if source.name.endswith(".parquet") and footers:
        metadata = open_parquet(Path(source.name), [column], RemoteFile(place, stop)).metadata
        groups = map(metadata.row_group, range(metadata.num_row_groups))
        text = sum(text_bytes(group, column) for group in groups)
        return _Size(int(text / BYTES_PER_TOKEN * ENGLISH / target.scale), metadata.num_rows, source.nbytes)
    return _Size(int(source.nbytes / bytes_per_token(source.name) * ENGLISH / target.scale), 0, source.nbytes)
