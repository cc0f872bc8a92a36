"""Parts to sealed shards. One part is one task: the process that encodes it writes its two shards, so no token ever
travels between processes, and what comes out does not depend on how many there are or who finishes first.

A part is sealed when its record lies in `.parts/`; the manifest, written last, gathers the records.
"""

import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from prepare.corpora import Corpus
from prepare.documents import read
from prepare.download import matches
from prepare.encode import Encoded, Encoder, EngineName
from prepare.parts import Part, plan
from shards.atomic import make_folder, publish_bytes, sha256_of, sweep
from shards.errors import CorruptError, HostError, MillpondError, RefusedError
from shards.header import Placement
from shards.manifest import Counts, Manifest, PartRecord, decode, encode
from shards.split import is_val
from shards.tokenizer import Tokenizer
from shards.writer import ShardWriter

Advance = Callable[[int], None]


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What every part of a token folder has in common. `manifest` is the one to publish, its parts those sealed."""

    folder: Path
    manifest: Manifest
    engine: EngineName


def tokenize(job: Job, corpus: Corpus, max_tokens: int, workers: int, advance: Advance) -> Manifest:
    """Seal parts until the folder has `max_tokens` (0: all of them), then publish and return its manifest.

    Sealed parts are kept from run to run, and published ones for ever. `advance(tokens)` is called as work goes on. The
    folder gets the shortest row of parts that holds enough, whatever was sealed beyond it, so growing in steps or at
    once ends the same. RefusedError when there are no parts, CorruptError when a file changed while it was read.
    """
    _check_tokenizer(job)
    make_folder(job.folder / ".parts")
    sweep(job.folder)
    sweep(job.folder / ".parts")
    published = len(job.manifest.parts)
    sealed = dict(enumerate(job.manifest.parts))
    pending = _Pending(job, plan(corpus, job.manifest.part_tokens), sealed)
    if workers <= 1:
        builder: Builder | None = None
        while not _holds(sealed, {}, max_tokens) and (part := pending.next()):
            builder = builder or Builder(job, advance)
            sealed[part.index] = builder.build(part)
    else:
        _in_pool(job, pending, sealed, max_tokens, workers, advance)
    chosen = list(_prefix(sealed, max_tokens, published))
    if not chosen:
        raise RefusedError(f"corpus {job.manifest.corpus.name}: no rows in its files", "", "name other files")
    _confirm_sources(job, corpus, chosen[published:])
    complete = not _holds(sealed, {}, max_tokens) or len(chosen) - 1 == pending.final_index or job.manifest.complete
    manifest = msgspec.structs.replace(job.manifest, parts=chosen, complete=complete)
    manifest.write(job.folder)
    kept = {name for name, _ in manifest.files()}
    for path in (*job.folder.glob("train-*"), *job.folder.glob("val-*")):
        if path.name not in kept:  # sealed beyond what was asked for, or half of a part that a kill cut short
            path.unlink()
    shutil.rmtree(job.folder / ".parts")
    return manifest


def _check_tokenizer(job: Job) -> None:
    """CorruptError unless the folder's tokenizer is its manifest's: more parts made with another mean other things."""
    record = job.manifest.tokenizer
    for name, sha256 in (("tokenizer.tiktoken", record.ranks_sha256), ("tokenizer.json", record.json_sha256)):
        found = sha256_of(job.folder / name)
        if found != sha256:
            raise CorruptError(
                f"{job.folder / name}: sha256 is {found}, the manifest says {sha256}",
                "with another tokenizer every token means something else",
                "millpond tokenize CONFIG --force",
            )


def _confirm_sources(job: Job, corpus: Corpus, built: list[PartRecord]) -> None:
    """CorruptError unless the files are still those that were hashed before they were read."""
    for i in sorted({record.source for record in built}):
        source, path = corpus.sources[i], corpus.path(i)
        if not matches(path, source.nbytes, source.digest):
            shutil.rmtree(job.folder / ".parts")
            raise CorruptError(
                f"{path}: changed while it was read: it is no longer {source.nbytes:,} bytes with {source.digest}",
                "the shards would not be what the manifest says they were made from; they were not published",
                "run the same command again",
            )


class _Pending:
    """The parts of a plan that are still to be built; those that an earlier run sealed go into `sealed` instead."""

    def __init__(self, job: Job, plan: Iterator[Part], sealed: dict[int, PartRecord]) -> None:
        self._job, self._plan, self._sealed = job, plan, sealed
        self.final_index = -1  # of the corpus's last part, once it has been seen

    def next(self) -> Part | None:
        """The next part to build, or None when there is none left."""
        for part in self._plan:
            if part.is_final:
                self.final_index = part.index
            if part.index in self._sealed:
                continue
            record = _sealed_before(self._job, part)
            if record is None:
                return part
            self._sealed[part.index] = record
        return None


class Builder:
    """One process's encoder, and the making of one part after another with it."""

    def __init__(self, job: Job, advance: Advance) -> None:
        self.job, self._advance = job, advance
        record = job.manifest.tokenizer
        self._tokenizer = Tokenizer.load(job.folder / "tokenizer.tiktoken", record.name, record.ranks_sha256)
        self._encoder = Encoder(self._tokenizer, job.folder, job.engine)

    def build(self, part: Part) -> PartRecord:
        """Write and seal the shards of `part`."""
        manifest = self.job.manifest
        counts = Counts()
        with ExitStack() as stack:
            train, val = (
                stack.enter_context(
                    ShardWriter(
                        path,
                        vocab_size=self._tokenizer.vocab_size,
                        eot=self._tokenizer.eot,
                        placement=manifest.placement,
                        fingerprint=manifest.fingerprint,
                    )
                )
                for path in _shard_paths(self.job.folder, part.index)
            )
            for batch in read(part.path, part.first, part.last, manifest.corpus.text_column):
                counts = counts.plus(batch.counts)
                if not batch.texts:
                    continue
                encoded = self._encoder.encode(batch.texts, batch.hashes, f"{part.path}, part {part.index}")
                tokens, starts = lay_out(encoded, self._tokenizer.eot, manifest.placement, train.dtype)
                ends = np.append(starts[1:], len(tokens))
                in_val = is_val(batch.hashes, manifest.val_fraction)
                for first, last in _runs(in_val):
                    a, b = starts[first], ends[last - 1]
                    shard = val if in_val[first] else train
                    shard.append(tokens[a:b], starts[first:last] - a, batch.hashes[first:last])
                self._advance(len(tokens))
            record = PartRecord(
                source=part.source,
                first=part.first,
                last=part.last,
                counts=counts,
                train=train.seal(),
                val=val.seal(),
            )
        publish_bytes(_receipt(self.job.folder, part.index), encode(record))
        return record


def lay_out(
    encoded: Encoded, eot: int, placement: Placement, dtype: np.dtype[np.unsignedinteger]
) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int64]]:
    """The documents end to end, an end-of-text `before` or `after` each: (tokens,), and (documents,) starts."""
    ids, offsets = encoded
    if len(ids) and int(ids.max()) >= eot:
        raise CorruptError(f"the engine gave token id {ids.max()}, the vocabulary's text ids end at {eot - 1}")
    count = len(offsets) - 1
    starts = offsets[:-1] + np.arange(count)
    marks = starts if placement == "before" else offsets[1:] + np.arange(count)
    tokens = np.empty(len(ids) + count, dtype)
    text = np.ones(len(tokens), np.bool_)
    text[marks] = False
    tokens[marks] = eot
    tokens[text] = ids
    return tokens, starts


def _runs(flags: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """The (first, last) of each stretch of equal flags."""
    edges = [0, *(np.flatnonzero(flags[1:] != flags[:-1]) + 1).tolist(), len(flags)]
    return pairwise(edges)


def _shard_paths(folder: Path, index: int) -> tuple[Path, Path]:
    return folder / f"train-{index:05}.bin", folder / f"val-{index:05}.bin"


def _receipt(folder: Path, index: int) -> Path:
    return folder / ".parts" / f"{index:05}.json"


def _sealed_before(job: Job, part: Part) -> PartRecord | None:
    """The record of a part that a run before this one sealed and did not live to publish."""
    receipt = _receipt(job.folder, part.index)
    if not receipt.exists():
        return None
    record = decode(receipt.read_bytes(), PartRecord, receipt)
    sizes = {path.name: path.stat().st_size for path in _shard_paths(job.folder, part.index) if path.exists()}
    return record if sizes == {shard.file: shard.nbytes for shard in (record.train, record.val)} else None


def _prefix(sealed: dict[int, PartRecord], max_tokens: int, at_least: int) -> Iterator[PartRecord]:
    """The parts from the first on without a gap, until they hold enough, and `at_least` so many."""
    tokens = index = 0
    while index in sealed and (index < at_least or not max_tokens or tokens < max_tokens):
        yield sealed[index]
        tokens += sealed[index].train.tokens + sealed[index].val.tokens
        index += 1


def _holds(sealed: dict[int, PartRecord], running: dict[int, int], max_tokens: int) -> bool:
    """Whether the parts from the first on without a gap hold `max_tokens`, those `running` by their estimates."""
    tokens = index = 0
    while max_tokens and tokens < max_tokens and (index in sealed or index in running):
        record = sealed.get(index)
        tokens += record.train.tokens + record.val.tokens if record else running[index]
        index += 1
    return bool(max_tokens) and tokens >= max_tokens


def _in_pool(
    job: Job, pending: _Pending, sealed: dict[int, PartRecord], max_tokens: int, workers: int, advance: Advance
) -> None:
    """Build `pending` on `workers` processes, adding to `sealed`; at most two tasks a worker wait in the queue."""
    context = multiprocessing.get_context("spawn")
    done, stop = context.Value("Q"), context.Event()
    running: dict[Future[PartRecord], Part] = {}
    shown = 0
    with ProcessPoolExecutor(workers, context, _start_worker, (job, done, stop)) as pool:
        try:
            while True:
                while len(running) < 2 * workers:
                    estimates = {part.index: part.estimated_tokens for part in running.values()}
                    if _holds(sealed, estimates, max_tokens) or not (part := pending.next()):
                        break
                    with _no_interrupt():
                        running[pool.submit(_build, part)] = part
                if not running:
                    return
                finished, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                advance(done.value - shown)
                shown = done.value
                for future in finished:
                    sealed[running.pop(future).index] = future.result()
        except BrokenProcessPool as error:
            raise HostError(
                "a worker process was killed or did not start, most likely because memory ran out",
                "the parts that were sealed are kept",
                f"run again with fewer than {workers} workers: --set tokens.workers=1",
            ) from error
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Processes that start here are born deaf to Ctrl-C, which the terminal sends to them as well."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited; ours comes when it is unblocked
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Stopped(MillpondError):
    pass


_builder: Builder


def _start_worker(job: Job, done: Any, stop: Any) -> None:
    """Set up one process of the pool: signals are the parent's to handle, and the parent's death is the worker's."""
    global _builder
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()

    def advance(tokens: int) -> None:
        with done.get_lock():
            done.value += tokens
        if stop.is_set():
            raise _Stopped("stopped")

    _builder = Builder(job, advance)


def _die_with(sentinel: int) -> None:
    wait_for([sentinel])
    os._exit(1)


def _build(part: Part) -> PartRecord:
    return _builder.build(part)
