"""The loader: every target once an epoch, position is its whole state, and the thread's failures are the caller's."""

import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import RefusedError, Shard, ShardWriter, TokenStream
from train.loader import TokenLoader, window_count


def stream_of(folder: Path, sizes: list[int], first_id: int = 0) -> TokenStream:
    """Shards whose tokens count up, so that a token says where it stands."""
    shards, at = [], first_id
    for i, size in enumerate(sizes):
        path = folder / f"train-{i:05}.bin"
        with ShardWriter(path, vocab_size=65_536, eot=65_535, placement="before", fingerprint="00" * 32) as shard:
            if size:
                shard.append(np.arange(at, at + size).astype(np.uint16), np.array([0]), np.zeros(1, np.uint64))
            shard.seal()
        shards.append(Shard(path))
        at += size
    return TokenStream(shards, np.dtype("<u2"))


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 120), min_size=1, max_size=4).filter(lambda sizes: sum(sizes) > 12),
    seq_len=st.integers(2, 11),
    batch_size=st.integers(1, 5),
    world_size=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_every_target_once_an_epoch(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    seq_len: int,
    batch_size: int,
    world_size: int,
    seed: int,
) -> None:
    stream = stream_of(tmp_path_factory.mktemp("shards"), sizes)
    windows = window_count(len(stream), seq_len)
    step = batch_size * world_size
    seen: Counter[int] = Counter()
    loaders = [
        TokenLoader(stream, seq_len, batch_size, seed, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    rows: list[list[int]] = []
    for _ in range(-(-windows // step)):
        for loader in loaders:
            batch = loader.next()
            assert torch.equal(batch.targets, batch.inputs + 1)  # the tokens count up
            rows += batch.targets.tolist()
    for loader in loaders:
        assert loader.position == -(-windows // step) * step
        loader.close()
    for row in rows[:windows]:
        seen.update(row)
    assert set(seen) == set(range(1, windows * seq_len + 1))
    assert set(seen.values()) == {1}


@settings(deadline=None, max_examples=20)
@given(changes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=6))
def test_batch_and_world_size_may_change_at_any_time(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    stream = stream_of(tmp_path_factory.mktemp("shards"), [200, 190])
    found: list[list[int]] = []
    position = 0
    for batch_size, world_size in changes:
        for rank in range(world_size):
            with TokenLoader(stream, 5, batch_size, 9, position=position, rank=rank, world_size=world_size) as loader:
                found += loader.next().inputs.tolist()
        position = loader.position
    with TokenLoader(stream, 5, position, 9) as loader:
        assert loader.next().inputs.tolist() == found


def test_position_counts_what_was_delivered_not_what_was_read_ahead(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, [1000])
    with TokenLoader(stream, 10, 2, 0) as loader:
        loader.next()
        time.sleep(0.05)  # the ring fills
        assert loader.position == 2
        rest = [loader.next().inputs for _ in range(20)]
    with TokenLoader(stream, 10, 2, 0, position=2) as resumed:
        for inputs in rest:
            assert torch.equal(resumed.next().inputs, inputs)


def test_ids_above_the_signed_range(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, [100], first_id=65_400)
    with TokenLoader(stream, 99, 1, 0) as loader:
        batch = loader.next()
    assert batch.inputs.dtype == torch.int64
    assert batch.inputs[0].tolist() == list(range(65_400, 65_499))


def test_a_batch_stays_what_it_was_when_the_ring_goes_round(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, [5000])
    with TokenLoader(stream, 10, 3, 0, depth=2) as loader:
        batches = [loader.next() for _ in range(30)]
        copies = [batch.inputs.clone() for batch in batches]
        time.sleep(0.02)
        for batch, copy in zip(batches, copies, strict=True):
            assert torch.equal(batch.inputs, copy)


def test_a_slow_read_is_hidden_by_the_ring(tmp_path: Path) -> None:
    """Depth 8: a pause of 60 ms in every 20 batches does not reach a step of 15 ms."""
    stream = stream_of(tmp_path, [20_000])
    read, calls = stream.read_into, 0

    def slow(start: int, out: np.ndarray) -> None:
        nonlocal calls
        calls += 1
        if calls % 20 == 0:
            time.sleep(0.06)
        read(start, out)

    stream.read_into = slow
    with TokenLoader(stream, 10, 1, 0) as loader:
        time.sleep(0.1)
        loader.next()
        began = loader.wait_seconds
        for _ in range(60):
            loader.next()
            time.sleep(0.015)
        assert calls >= 60
        assert loader.wait_seconds - began < 0.015  # of 180 ms of pauses


def test_an_error_in_the_thread_is_raised_by_next(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, [1000])

    def broken(start: int, out: np.ndarray) -> None:
        raise OSError("the disk went away")

    stream.read_into = broken
    with TokenLoader(stream, 10, 1, 0) as loader:
        for _ in range(2):
            with pytest.raises(OSError, match="the disk went away"):
                loader.next()


def test_close_ends_the_thread(tmp_path: Path) -> None:
    loader = TokenLoader(stream_of(tmp_path, [1000]), 10, 1, 0)
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "loader"]


def test_a_split_too_small_for_one_window(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="the split has 10 tokens, one window takes 11"):
        TokenLoader(stream_of(tmp_path, [10]), 10, 1, 0)
