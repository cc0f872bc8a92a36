"""Shards written for one test, whose tokens say where they stand."""

from pathlib import Path

import numpy as np

from shards import Shard, ShardWriter, TokenStream


def counting_stream(folder: Path, sizes: list[int], first_id: int = 0) -> TokenStream:
    """One shard of each size, one document in each; their tokens count up from `first_id` through all of them."""
    shards, at = [], first_id
    for i, size in enumerate(sizes):
        path = folder / f"train-{i:05}.bin"
        with ShardWriter(path, vocab_size=65_536, eot=65_535, placement="before", fingerprint="00" * 32) as shard:
            if size:
                shard.append(np.arange(at, at + size).astype(np.uint16), np.array([0]), np.zeros(1, np.uint64))
            shard.seal()
        if size:  # one without tokens is not on disk
            shards.append(Shard(path))
        at += size
    return TokenStream(shards, np.dtype("<u2"))
