"""End to end (parquet in, sealed and hashed shards out) against tiktoken's own loop, side by side in one run.

    python -P tests/benchmarks/prepare.py [FILE.parquet ...] [--rounds 3] [--check]

(-P, or this file would stand in for the package of its name.) Without files: the documentation of the installed
packages. Rates are Mtok per CPU-second, user and system, of all processes, with what the engines cost to start. The
tokenizer's two files, which a folder gets once, are timed apart. `--check` also compares every document's ids with
tiktoken's, and the folders that 1, 2 and 3 workers and both engines make, byte for byte.
"""

import argparse
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import xxhash

from pipeline.fingerprint import fingerprint
from prepare import corpora, vocabulary
from prepare.build import Job, tokenize
from prepare.config import CorpusConfig
from prepare.encode import FastokensEngine
from shards import Manifest, TokenFolder


def cpu_seconds() -> float:
    """User and system time of this process and of its finished children."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def timed(work: Callable[[], int]) -> tuple[int, float, float]:
    """Tokens, CPU seconds and wall seconds of `work`."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    tokens = work()
    return tokens, cpu_seconds() - cpu, time.perf_counter() - wall


def job_in(corpus: corpora.Corpus, folder: Path, engine: str) -> Job:
    """A fresh folder that holds its tokenizer and nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    manifest = Manifest(
        format="millpond-tokens-1",
        fingerprint=fingerprint({"sources": corpus.sources}),
        corpus=corpus.record,
        sources=corpus.sources,
        tokenizer=vocabulary.save(vocabulary.gpt2(), folder),
        placement="before",
        val_fraction=0.005,
        part_tokens=5_000_000,
        complete=False,
        parts=[],
    )
    return Job(folder=folder, manifest=manifest, engine=engine)


def prepare(corpus: corpora.Corpus, job: Job, workers: int) -> int:
    """Plan, tokenize, seal: what `millpond tokenize` does with a corpus that is there."""
    manifest = tokenize(job, corpus, 0, workers, lambda _: None)
    return manifest.tokens("train") + manifest.tokens("val")


def tiktoken_loop(corpus: corpora.Corpus) -> int:
    """Read a row, encode it, count it: what one writes without thinking of speed, and without writing anything."""
    encoding = vocabulary.gpt2().encoding
    tokens = 0
    for path in map(corpus.path, range(len(corpus.sources))):
        for batch in pq.ParquetFile(path).iter_batches(1000, columns=[corpus.record.text_column], use_threads=False):
            tokens += sum(len(encoding.encode_ordinary(text)) for text in batch.column(0).to_pylist())
    return tokens


def check_ids(corpus: corpora.Corpus, folder: Path) -> int:
    """Compare every document of the folder with tiktoken; the number of documents."""
    tokens = TokenFolder(folder)
    encoding = tokens.tokenizer.encoding
    ours: dict[int, list[int]] = {}
    for shard in (*tokens.shards("train"), *tokens.shards("val")):
        for i, key in enumerate(shard.documents["hash"].tolist()):
            ours[key] = shard.document(i)[1:].tolist()
    documents = 0
    for path in map(corpus.path, range(len(corpus.sources))):
        for batch in pq.ParquetFile(path).iter_batches(1000, columns=[corpus.record.text_column]):
            for text in batch.column(0).to_pylist():
                right = encoding.encode_ordinary(text)
                if ours[xxhash.xxh3_64_intdigest(text.encode())] != right:
                    sys.exit(f"document {documents} of {path.name}: other ids than tiktoken's")
                documents += 1
    return documents


def tree(folder: Path) -> dict[str, bytes]:
    """Every file and its bytes."""
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temp:
        home = Path(temp)
        config = CorpusConfig(kind="files", files=tuple(arguments.files))
        corpus = corpora.fetch(config if arguments.files else CorpusConfig(name="python-docs"), home / "raw")
        megabytes = sum(source.nbytes for source in corpus.sources) / 1e6
        print(f"{len(corpus.sources)} files, {megabytes:.1f} MB compressed; {os.cpu_count()} cores")
        began = time.perf_counter()
        job_in(corpus, home / "one", "fastokens")
        print(f"the tokenizer's files, once a folder: {time.perf_counter() - began:.2f} s")
        cpu = cpu_seconds()
        FastokensEngine(home / "one")
        start = cpu_seconds() - cpu
        print(f"the fast engine's start, once a worker: {start:.2f} CPU s")
        rates: dict[str, list[float]] = {
            "ours": [],
            "ours, without the start": [],
            "tiktoken's loop": [],
            "ours, 2 workers": [],
        }
        for _ in range(arguments.rounds):
            for name, job, work in (
                ("ours", job_in(corpus, home / "one", "fastokens"), lambda job: prepare(corpus, job, 1)),
                ("tiktoken's loop", None, lambda _: tiktoken_loop(corpus)),
                ("ours, 2 workers", job_in(corpus, home / "two", "fastokens"), lambda job: prepare(corpus, job, 2)),
            ):
                tokens, cpu, wall = timed(lambda: work(job))  # noqa: B023  (called at once)
                rates[name].append(tokens / 1e6 / cpu)
                if name == "ours":
                    rates["ours, without the start"].append(tokens / 1e6 / (cpu - start))
                print(
                    f"  {name:<16} {tokens:>12,} tokens  {cpu:6.2f} CPU s  {wall:6.2f} s wall  {rates[name][-1]:6.2f}"
                )
        medians = {name: statistics.median(values) for name, values in rates.items()}
        for name, rate in medians.items():
            ratio = rate / medians["tiktoken's loop"]
            print(f"{name:<24} {rate:6.2f} Mtok per CPU-second  {ratio:5.2f}x tiktoken's loop")
        if arguments.check:
            print(f"ids: {check_ids(corpus, home / 'one'):,} documents, every id is tiktoken's")
            first = tree(home / "one")
            for workers, engine in ((2, "fastokens"), (3, "fastokens"), (1, "tiktoken"), (2, "tiktoken")):
                prepare(corpus, job_in(corpus, home / "other", engine), workers)
                if tree(home / "other") != first:
                    sys.exit(f"{workers} workers with {engine}: other bytes")
            print("folders: 1, 2 and 3 workers and both engines, byte for byte the same")


if __name__ == "__main__":
    main()
