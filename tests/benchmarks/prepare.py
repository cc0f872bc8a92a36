"""`millpond tokenize` end to end (parquet in, sealed and hashed shards out) beside tiktoken alone and the usual ways.

    python -P tests/benchmarks/prepare.py [FILE.parquet ...] [--repeat 20] [--rounds 3] [--check]

(-P, or this file would stand in for the package of its name.) Without files: the documentation of the installed
packages. Every contestant is a process of its own. End to end counts that process whole, imports and start included;
"alone" counts the loop and finds its text in RAM. CPU seconds are user and system of all processes; memory is the peak
of the whole tree's proportional set size. `--check` also compares every document's ids with tiktoken's, and the folders
that 1, 2 and 3 workers and both engines make, byte for byte.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pyarrow.parquet as pq
import xxhash

from prepare.build import FolderSpec, tokenize
from prepare.config import CorpusConfig
from prepare.corpus import pin
from prepare.tokens import vocabulary
from prepare.tokens.encode import FastokensEngine
from shards import Manifest, TokenFolder
from shards.fingerprint import fingerprint

ROWS = 1000  # a batch
WORKERS = 2  # of the pools, ours and the others'


class Result(NamedTuple):
    """One run of one contestant. `pss`: bytes."""

    tokens: int
    cpu: float
    wall: float
    pss: int


def texts_of(files: list[Path]) -> Iterator[list[str]]:
    """The texts, batch by batch."""
    for path in files:
        for batch in pq.ParquetFile(path).iter_batches(ROWS, columns=["text"], use_threads=False):
            yield batch.column(0).to_pylist()


def rows_of(files: list[Path]) -> Iterator[dict[str, Any]]:
    """The rows as dicts of all their columns, as a loop over a `datasets` dataset yields them."""
    for path in files:
        for batch in pq.ParquetFile(path).iter_batches(ROWS):
            yield from batch.to_pylist()


# Alone: each returns the loop to be timed, its text in RAM. -----------------------------------------------------------


def tiktoken_lists(files: list[Path], repeat: int, home: Path) -> Callable[[], int]:
    encode = vocabulary.gpt2().encoding.encode_ordinary
    texts = [text for batch in texts_of(files) for text in batch]
    return lambda: sum(len(encode(text)) for text in texts)


def tiktoken_numpy(files: list[Path], repeat: int, home: Path) -> Callable[[], int]:
    encode = vocabulary.gpt2().encoding.encode_to_numpy
    texts = [text for batch in texts_of(files) for text in batch]
    return lambda: sum(len(encode(text, disallowed_special=())) for text in texts)


def tiktoken_threads(files: list[Path], repeat: int, home: Path) -> Callable[[], int]:
    encode = vocabulary.gpt2().encoding.encode_ordinary_batch
    batches = list(texts_of(files))
    return lambda: sum(len(ids) for batch in batches for ids in encode(batch, num_threads=WORKERS))


def fast_engine(files: list[Path], repeat: int, home: Path) -> Callable[[], int]:
    vocabulary.save(vocabulary.gpt2(), home)
    engine = FastokensEngine(home)
    batches = list(texts_of(files))
    return lambda: sum(len(engine.encode(batch).ids) for _ in range(repeat) for batch in batches)


def fast_engine_once(files: list[Path], repeat: int, home: Path) -> Callable[[], int]:
    return fast_engine(files, 1, home)


def reading(files: list[Path], repeat: int, home: Path) -> Callable[[], int]:
    return lambda: sum(len(batch) for batch in texts_of(files))  # documents; the tokens are tiktoken's count


# The usual ways, in our own words. ------------------------------------------------------------------------------------


def start_pattern() -> None:
    global _encoding
    _encoding = vocabulary.gpt2().encoding


def array_of(row: dict[str, Any]) -> np.ndarray[Any, np.dtype[np.uint16]]:
    ids = np.array([_encoding.eot_token, *_encoding.encode_ordinary(row["text"])])
    if not ((ids >= 0) & (ids < 2**16)).all():
        raise ValueError("an id that uint16 cannot hold")
    return ids.astype(np.uint16)


def pool_to_writer(files: list[Path], repeat: int, home: Path) -> Callable[[], int]:
    """build-nanogpt's fineweb.py, llm.c's too: a pool returns an array a document, one process fills shards."""

    def run() -> int:
        shard, filled, written = np.empty(100_000_000, np.uint16), 0, 0

        def save() -> None:
            nonlocal filled, written
            np.save(home / f"{written:015}.npy", shard[:filled])
            written, filled = written + filled, 0

        with multiprocessing.Pool(WORKERS, start_pattern) as pool:
            for ids in pool.imap(array_of, rows_of(files), chunksize=16):
                while len(ids):
                    room = min(len(ids), len(shard) - filled)
                    shard[filled : filled + room] = ids[:room]
                    filled, ids = filled + room, ids[room:]
                    if filled == len(shard):
                        save()
            pool.close()
            pool.join()
        save()
        return written

    return run


def map_to_memmap(files: list[Path], repeat: int, home: Path) -> Callable[[], int]:
    """nanoGPT's openwebtext: `datasets` maps each example to a list of ids, then 1,024 slices go into a memmap."""
    import datasets

    datasets.disable_progress_bars()
    start_pattern()
    encoding = _encoding

    def process(row: dict[str, Any]) -> dict[str, Any]:
        ids = [*encoding.encode_ordinary(row["text"]), encoding.eot_token]
        return {"ids": ids, "len": len(ids)}

    def run() -> int:
        rows = datasets.Dataset.from_parquet([str(path) for path in files], cache_dir=str(home))
        mapped = rows.map(process, remove_columns=rows.column_names, num_proc=WORKERS)
        total = int(np.sum(mapped["len"], dtype=np.uint64))
        out, at = np.memmap(home / "train.bin", np.uint16, "w+", shape=(total,)), 0
        for index in range(1024):
            piece = mapped.shard(num_shards=1024, index=index, contiguous=True).with_format("numpy")
            if len(piece):
                ids = np.concatenate(piece["ids"])
                out[at : at + len(ids)] = ids
                at += len(ids)
        out.flush()
        return total

    return run


ALONE = {
    "tiktoken encode_ordinary": tiktoken_lists,
    "tiktoken encode_to_numpy": tiktoken_numpy,
    f"tiktoken batch, {WORKERS} threads": tiktoken_threads,
    "fast engine, new text": fast_engine_once,
    "fast engine, repeated": fast_engine,
    "reading parquet": reading,
}
PATTERNS = {"imap to one writer": pool_to_writer, "datasets.map, memmap": map_to_memmap}
TIKTOKEN = [name for name in ALONE if name.startswith("tiktoken")]


# Measuring ------------------------------------------------------------------------------------------------------------


def cpu_seconds(*of: int) -> float:
    """User and system time of this process (RUSAGE_SELF), of its finished children and theirs, or of both."""
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, of))


def be(name: str, files: list[Path], repeat: int, home: Path) -> None:
    """Run as the contestant, and print its tokens and what the loop took."""
    both = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    run = (ALONE | PATTERNS)[name](files, repeat, home)
    cpu, wall = cpu_seconds(*both), time.perf_counter()
    tokens = run()
    print(json.dumps([tokens, cpu_seconds(*both) - cpu, time.perf_counter() - wall]))


def measured(command: list[str], home: Path) -> tuple[Result, str]:
    """Run a process beside an empty folder `home`: what it took from start to end, and what it printed."""
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    cpu, wall = cpu_seconds(resource.RUSAGE_CHILDREN), time.perf_counter()
    peak = [0]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        watch = threading.Thread(target=watch_pss, args=(psutil.Process(process.pid), peak))
        watch.start()
        out, err = process.communicate()
    watch.join()
    if process.returncode:
        sys.exit(f"{' '.join(command)}\n{err}")
    return Result(0, cpu_seconds(resource.RUSAGE_CHILDREN) - cpu, time.perf_counter() - wall, peak[0]), out


def watch_pss(root: psutil.Process, peak: list[int]) -> None:
    """Keep in `peak` the largest sum of what the processes under `root` hold, looked at ten times a second."""
    while root.is_running() and root.status() != psutil.STATUS_ZOMBIE:
        total = 0
        try:
            for process in (root, *root.children(recursive=True)):
                for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
                    if line.startswith("Pss:"):
                        total += int(line.split()[1]) * 1024
        except (OSError, psutil.Error):  # one of them ended meanwhile
            pass
        peak[0] = max(peak[0], total)
        time.sleep(0.1)


def contest(name: str, files: list[Path], repeat: int, home: Path) -> Result:
    """One contestant but ours."""
    arguments = [*("--contestant", name), *("--repeat", str(repeat)), *("--home", str(home)), *map(str, files)]
    whole, out = measured([sys.executable, "-P", __file__, *arguments], home)
    tokens, cpu, wall = json.loads(out.splitlines()[-1])
    return whole._replace(tokens=tokens) if name in PATTERNS else Result(tokens, cpu, wall, whole.pss)


def ours(file: Path, workers: int, home: Path) -> Result:
    """The command a user types, its home and recipe new."""
    toml = home.with_suffix(".toml")
    toml.write_text(f'[corpus]\nkind = "files"\nfiles = ["{file}"]\n[tokens]\nworkers = {workers}\n')
    command = [sys.executable, "-P", "-m", "pipeline.cli.main", "tokenize", str(toml), "--home", str(home)]
    whole, _ = measured(command, home)
    manifest = Manifest.read(next((home / "tokens").iterdir()))
    return whole._replace(tokens=manifest.tokens("train") + manifest.tokens("val"))


def repeated(files: list[Path], repeat: int, path: Path) -> Path:
    """All row groups of `files`, `repeat` times over, in one parquet file."""
    sources = [pq.ParquetFile(file) for file in files]
    codec = sources[0].metadata.row_group(0).column(0).compression
    with pq.ParquetWriter(path, sources[0].schema_arrow, compression=codec) as out:
        for _ in range(repeat):
            for source in sources:
                for group in range(source.num_row_groups):
                    out.write_table(source.read_row_group(group))
    return path


# The check ------------------------------------------------------------------------------------------------------------


def job_in(corpus: pin.Corpus, folder: Path, engine: str) -> FolderSpec:
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
    return FolderSpec(folder=folder, manifest=manifest, engine=engine)


def check_ids(files: list[Path], folder: Path) -> int:
    """Compare every document of the folder with tiktoken; the number of documents."""
    tokens = TokenFolder(folder)
    encoding = tokens.tokenizer.encoding
    ours: dict[int, list[int]] = {}
    for shard in (*tokens.shards("train"), *tokens.shards("val")):
        for i, key in enumerate(shard.documents["hash"].tolist()):
            ours[key] = shard.document(i)[1:].tolist()
    documents = 0
    for batch in texts_of(files):
        for text in batch:
            if ours[xxhash.xxh3_64_intdigest(text.encode())] != encoding.encode_ordinary(text):
                sys.exit(f"document {documents}: other ids than tiktoken's")
            documents += 1
    return documents


def check(corpus: pin.Corpus, files: list[Path], home: Path) -> None:
    """Every id is tiktoken's, and no number of workers and no engine changes a byte."""

    def tree(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    tokenize(job_in(corpus, home / "one", "fastokens"), corpus, 0, 1, lambda _: None)
    print(f"ids: {check_ids(files, home / 'one'):,} documents, every id is tiktoken's")
    for workers, engine in ((2, "fastokens"), (3, "fastokens"), (1, "tiktoken"), (2, "tiktoken")):
        tokenize(job_in(corpus, home / "other", engine), corpus, 0, workers, lambda _: None)
        if tree(home / "other") != tree(home / "one"):
            sys.exit(f"{workers} workers with {engine}: other bytes")
    print("folders: 1, 2 and 3 workers and both engines, byte for byte the same")


def compare(files: list[Path], repeat: int, rounds: int, home: Path) -> None:
    """Everybody in turn, `rounds` times; then the medians."""
    large = repeated(files, repeat, home / "repeated.parquet")
    print(
        f"{len(files)} files {repeat} times over, {large.stat().st_size / 1e6:,.0f} MB; {os.cpu_count()} cores\n"
        "Only millpond and the fast engine get the repeats; the others, who know no yesterday, get the text once.\n"
        "The fast engine remembers words it has split: on repeats it is faster than on new text of that size."
    )
    results: dict[str, list[Result]] = {}
    for _ in range(rounds):
        for name in ALONE | PATTERNS:
            results.setdefault(name, []).append(contest(name, files, repeat, home / "work"))
        for workers in (1, WORKERS):
            results.setdefault(f"millpond tokenize, workers: {workers}", []).append(ours(large, workers, home / "work"))
        once = repeated(files, 1, home / "once.parquet")
        results.setdefault("millpond tokenize, new text", []).append(ours(once, 1, home / "work"))
    table = {
        name: Result(*(statistics.median(values) for values in zip(*runs, strict=True)))
        for name, runs in results.items()
    }
    tokens = table[TIKTOKEN[0]].tokens
    table["reading parquet"] = table["reading parquet"]._replace(tokens=tokens)
    strongest = max(table[name].tokens / table[name].cpu for name in TIKTOKEN)
    print(f"{'':<28}{'Mtok':>7}{'Mtok/CPU-s':>12}{'Mtok/s':>9}{'x tiktoken':>12}{'PSS MB':>8}")
    for name, (count, cpu, wall, pss) in table.items():
        rate = count / 1e6 / cpu
        print(
            f"{name:<28}{count / 1e6:>7.1f}{rate:>12.2f}{count / 1e6 / wall:>9.2f}"
            f"{rate * 1e6 / strongest:>12.2f}{pss / 1e6:>8.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--repeat", type=int, default=1, help="feed ours and the fast engine the files so many times")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        be(arguments.contestant, arguments.files, arguments.repeat, arguments.home)
        return
    with tempfile.TemporaryDirectory() as temp:
        home = Path(temp)
        config = CorpusConfig(kind="files", files=tuple(map(str, arguments.files)))
        corpus = pin.pin(config if arguments.files else CorpusConfig(name="python-docs"), home / "raw")
        files = [corpus.path(i) for i in range(len(corpus.sources))]
        compare(files, arguments.repeat, arguments.rounds, home)
        if arguments.check:
            check(corpus, files, home)


if __name__ == "__main__":
    main()
