"""CPU time of one batch, int64 inputs and targets delivered on the CPU, against the usual loaders, in one run.

    python -P tests/benchmarks/loader.py [--tokens 100_000_000] [--batches 300] [--rounds 5]

The others are re-created in our own words: `memmap a batch` opens an np.memmap for every batch, draws random offsets,
The others are re-created in our own words: `memmap a batch` opens an np.memmap for each batch, draws random offsets,
process, so what ours spends in the background counts. The page cache is warm.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from shards import Shard, ShardWriter, TokenStream
from train.loader import TokenLoader

SEQ_LEN = 1024


def make_shards(folder: Path, tokens: int) -> list[Path]:
    """Four shards of random tokens, 1,000 a document."""
    random = np.random.default_rng(0)
    paths = [folder / f"train-{i:05}.bin" for i in range(4)]
    for path in paths:
        with ShardWriter(path, vocab_size=50257, eot=50256, placement="before", fingerprint="00" * 32) as shard:
            for _ in range(tokens // 4 // 1_000_000):
                ids = random.integers(0, 50256, 1_000_000, dtype=np.uint16)
                starts = np.arange(0, 1_000_000, 1000)
                ids[starts] = 50256
                shard.append(ids, starts, np.zeros(1000, np.uint64))
            shard.seal()
    return paths


def memmap_batch(path: Path, batch_size: int, kept: np.ndarray | None) -> tuple[torch.Tensor, torch.Tensor]:
    data = np.memmap(path, np.uint16, "r", offset=1024) if kept is None else kept
    at = torch.randint(len(data) - SEQ_LEN, (batch_size,))
    x = torch.stack([torch.from_numpy(data[i : i + SEQ_LEN].astype(np.int64)) for i in at])
    y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + SEQ_LEN].astype(np.int64)) for i in at])
    return x, y


def microseconds(next_batch: Callable[[], object], batches: int) -> float:
    """CPU microseconds a batch."""
    for _ in range(20):
        next_batch()
    began = time.process_time()
    for _ in range(batches):
        next_batch()
    return (time.process_time() - began) / batches * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--batches", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temp:
        paths = make_shards(Path(temp), arguments.tokens)
        stream = TokenStream([Shard(path) for path in paths], np.dtype("<u2"))
        for path in paths:
            path.read_bytes()
        kept = np.memmap(paths[0], np.uint16, "r", offset=1024)
        print(f"{arguments.tokens:,} tokens in 4 shards, windows of {SEQ_LEN}, page cache warm")
        for batch_size in (32, 64):
            found: dict[str, list[float]] = {"ours": [], "memmap kept": [], "memmap a batch": []}
            for seed in range(arguments.rounds):
                with TokenLoader(stream, SEQ_LEN, batch_size, seed) as loader:
                    found["ours"].append(microseconds(loader.next, arguments.batches))
                for name, data in (("memmap kept", kept), ("memmap a batch", None)):
                    found[name].append(
                        microseconds(lambda data=data: memmap_batch(paths[0], batch_size, data), arguments.batches)  # noqa: B023
                    )
            ours = statistics.median(found["ours"])
            for name, values in found.items():
                median = statistics.median(values)
                print(f"batch {batch_size}  {name:<15} {median:8.0f} us CPU a batch  {median / ours:6.2f}x ours")


if __name__ == "__main__":
    main()
