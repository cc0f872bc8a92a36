"""CPU time of one batch, int64 inputs and targets delivered on the CPU, against the usual loaders, in one run.

    python -P tests/benchmarks/loader.py [--tokens 100_000_000] [--batches 300] [--rounds 5]

The others are re-created in our own words: `memmap a batch` opens an np.memmap for each batch, draws random offsets,
slices with them as the tensors they are, widens and stacks; `memmap kept` opens it once; `DataLoader` is torch's, over
a data set of windows, shuffled, in this process. CPU time is of all threads, so what ours spends in the background
counts; rounds alternate, medians are shown. The page cache is warm. Then: how long 1,000 shards take to open.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from shards import Shard, ShardWriter, TokenStream
from shards.reader import allow_open_files
from train.data.loader import TokenLoader
from train.data.windows import FolderWindows

SEQ_LEN = 1024
Pair = tuple[torch.Tensor, torch.Tensor]


def make_shards(folder: Path, count: int, millions: int) -> list[Path]:
    """`count` shards of so many million random tokens, 1,000 a document; of 1,000 tokens when `millions` is 0."""
    random = np.random.default_rng(0)
    paths = [folder / f"train-{i:05}.bin" for i in range(count)]
    size = 1_000_000 if millions else 1000
    for path in paths:
        with ShardWriter(path, vocab_size=50257, eot=50256, placement="before", fingerprint="00" * 32) as shard:
            for _ in range(millions or 1):
                ids = random.integers(0, 50256, size, dtype=np.uint16)
                starts = np.arange(0, size, 1000)
                ids[starts] = 50256
                shard.append(ids, starts, np.zeros(len(starts), np.uint64))
            shard.seal()
    return paths


def window(data: np.ndarray, at: int | torch.Tensor) -> Pair:
    x, y = (torch.from_numpy(data[i : i + SEQ_LEN].astype(np.int64)) for i in (at, at + 1))
    return x, y


def memmap_batch(path: Path, batch_size: int, kept: np.ndarray | None) -> Pair:
    data = np.memmap(path, np.uint16, "r", offset=1024) if kept is None else kept
    pairs = [window(data, i) for i in torch.randint(len(data) - SEQ_LEN, (batch_size,))]
    x, y = (torch.stack(column) for column in zip(*pairs, strict=True))
    return x, y


class WindowsOf(Dataset[Pair]):
    def __init__(self, data: np.ndarray) -> None:
        self.data = data

    def __len__(self) -> int:
        return (len(self.data) - 1) // SEQ_LEN

    def __getitem__(self, k: int) -> Pair:
        return window(self.data, k * SEQ_LEN)


def endless(loader: DataLoader[Pair]) -> Iterator[Pair]:
    while True:
        yield from loader


def microseconds(next_batch: Callable[[], object], batches: int) -> float:
    """CPU microseconds a batch."""
    for _ in range(20):
        next_batch()
    began = time.process_time()
    for _ in range(batches):
        next_batch()
    return (time.process_time() - began) / batches * 1e6


def compare(paths: list[Path], batches: int, rounds: int) -> None:
    windows = TokenStream([Shard(path) for path in paths], np.dtype("<u2"))
    for path in paths:
        path.read_bytes()
    kept = np.memmap(paths[0], np.uint16, "r", offset=1024)
    print("| batch | loader | CPU us a batch | times ours |\n|---|---|---|---|")
    for batch_size in (32, 64):
        found: dict[str, list[float]] = {}

        def measure(name: str, next_batch: Callable[[], object], found: dict[str, list[float]] = found) -> None:
            found.setdefault(name, []).append(microseconds(next_batch, batches))

        for seed in range(rounds):
            with TokenLoader(FolderWindows(windows, SEQ_LEN, seed), batch_size) as loader:
                measure("ours", loader.next)
            with TokenLoader(FolderWindows(windows, SEQ_LEN, seed), batch_size, documents=True) as loader:
                measure("ours, with document ends", loader.next)
            others = endless(DataLoader(WindowsOf(kept), batch_size, shuffle=True, drop_last=True))
            measure("DataLoader", lambda others=others: next(others))
            measure("memmap kept", lambda size=batch_size: memmap_batch(paths[0], size, kept))
            measure("memmap a batch", lambda size=batch_size: memmap_batch(paths[0], size, None))
        ours = statistics.median(found["ours"])
        for name, values in found.items():
            median = statistics.median(values)
            print(f"| {batch_size} | {name} | {median:.0f} | {median / ours:.2f} |")


def opening(paths: list[Path]) -> float:
    """Seconds until the first batch could be read; the files were made just now, so nothing waits for a disk."""
    began = time.perf_counter()
    FolderWindows(TokenStream([Shard(path) for path in paths], np.dtype("<u2")), 64, 0)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--batches", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temp:
        print(f"{arguments.tokens:,} tokens in 4 shards, windows of {SEQ_LEN}, page cache warm\n")
        compare(make_shards(Path(temp), 4, arguments.tokens // 4_000_000), arguments.batches, arguments.rounds)
    with tempfile.TemporaryDirectory() as temp:
        allow_open_files(1000)
        paths = make_shards(Path(temp), 1000, 0)
        print(f"\n1,000 shards open in {statistics.median(opening(paths) for _ in range(arguments.rounds)):.3f} s")


if __name__ == "__main__":
    main()
