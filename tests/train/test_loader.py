"""The loader: every target once an epoch, position is its whole state, and the thread's failures are the caller's."""

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import torch
from harness import complains
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import counting_stream

from shards import RefusedError, TokenFolder
from shards.reader import Tokens
from train.data.loader import DEPTH, EXCHANGED, TokenLoader
from train.data.staging import Slot
from train.data.windows import FolderWindows, position_of, window_count


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 120), min_size=1, max_size=4).filter(lambda sizes: sum(sizes) > 12),
    seq_len=st.integers(2, 11),
    batch_size=st.integers(1, 5),
    world_size=st.integers(1, 3),
    seed=st.integers(0, 1000),
    order=st.sampled_from(["shuffled", "sequential"]),
)
def test_every_target_once_an_epoch(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    seq_len: int,
    batch_size: int,
    world_size: int,
    seed: int,
    order: str,
) -> None:
    stream = counting_stream(tmp_path_factory.mktemp("shards"), sizes)
    windows = window_count(len(stream), seq_len)
    step = batch_size * world_size
    seen: Counter[int] = Counter()
    loaders = [
        TokenLoader(FolderWindows(stream, seq_len, seed, order), batch_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
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
    if order == "sequential":
        assert sorted(rows[:windows]) == rows[:windows]


@settings(deadline=None, max_examples=20)
@given(changes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=6))
def test_batch_and_world_size_may_change_at_any_time(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    windows = FolderWindows(counting_stream(tmp_path_factory.mktemp("shards"), [200, 190]), 5, 9)
    found: list[list[int]] = []
    position = 0
    for batch_size, world_size in changes:
        for rank in range(world_size):
            with TokenLoader(windows, batch_size, position=position, rank=rank, world_size=world_size) as loader:
                found += loader.next().inputs.tolist()
        position = loader.position
    with TokenLoader(windows, position) as loader:
        assert loader.next().inputs.tolist() == found


def test_position_counts_what_was_delivered_not_what_was_read_ahead(tmp_path: Path) -> None:
    windows = FolderWindows(counting_stream(tmp_path, [1000]), 10, 0)
    with TokenLoader(windows, 2) as loader:
        loader.next()
        until_ready(loader, DEPTH + EXCHANGED - 1)
        assert loader.position == 2
        state = loader.state()
        rest = [loader.next().inputs for _ in range(20)]
    with TokenLoader(windows, 2, position=position_of(windows, state)) as resumed:
        for inputs in rest:
            assert torch.equal(resumed.next().inputs, inputs)


def test_a_state_is_refused_by_other_data(tiny_folder: Path) -> None:
    folder = TokenFolder(tiny_folder)
    windows = FolderWindows.of(folder, "train", 32, 7)
    state = windows.state(64)
    assert position_of(windows, state) == 64
    assert msgspec.json.decode(msgspec.json.encode(state), type=type(state)) == state
    for field, other in (
        ("seq_len 32, here 16", FolderWindows.of(folder, "train", 16, 7)),
        ("seed 7, here 8", FolderWindows.of(folder, "train", 32, 8)),
        ("order shuffled, here sequential", FolderWindows.of(folder, "train", 32, 7, "sequential")),
        ("windows", FolderWindows.of(TokenFolder(tiny_folder, parts=1), "train", 32, 7)),
        ("fingerprint", FolderWindows(folder.stream("train"), 32, 7, fingerprint="00" * 32)),
    ):
        with pytest.raises(RefusedError, match=field):
            position_of(other, state)


def test_ids_above_the_signed_range(tmp_path: Path) -> None:
    with TokenLoader(FolderWindows(counting_stream(tmp_path, [100], first_id=65_400), 99, 0), 1) as loader:
        batch = loader.next()
    assert batch.inputs.dtype == torch.int64
    assert batch.inputs[0].tolist() == list(range(65_400, 65_499))


def test_a_batch_stays_what_it_was_when_the_ring_goes_round(tmp_path: Path) -> None:
    with TokenLoader(FolderWindows(counting_stream(tmp_path, [5000]), 10, 0), 3, depth=2) as loader:
        batches = [loader.next() for _ in range(30)]
        copies = [batch.inputs.clone() for batch in batches]
        until_ready(loader, 2 + EXCHANGED - 30 % EXCHANGED)
        for batch, copy in zip(batches, copies, strict=True):
            assert torch.equal(batch.inputs, copy)


class Paced(FolderWindows):
    """Windows whose every read waits until the test allows one more."""

    def __init__(self, folder: Path) -> None:
        super().__init__(counting_stream(folder, [20_000]), 10, 0)
        self._allowed, self._reads = threading.Semaphore(0), 0

    def allow(self, reads: int) -> None:
        """Let so many reads happen, those of before included."""
        for _ in range(reads - self._reads):
            self._allowed.release()
        self._reads = max(self._reads, reads)

    def __enter__(self) -> "Paced":
        return self

    def __exit__(self, *_: object) -> None:
        self.allow(self._reads + 100)  # whatever happened, the thread can end

    def read(self, position: int, rows: Sequence[Tokens]) -> None:
        self._allowed.acquire()
        super().read(position, rows)


def until_ready(loader: TokenLoader, batches: int) -> None:
    """Wait for the thread to have filled so many slots. Only a loader that is broken takes longer than no time."""
    for _ in range(10_000):
        if loader.stats().ready == batches:
            return
        time.sleep(0.001)
    raise AssertionError(f"{loader.stats().ready} batches are ready, expected {batches}")


@pytest.mark.parametrize("depth", [4, 8])
def test_pauses_of_the_disk_that_the_ring_hides(tmp_path: Path, depth: int) -> None:
    """Steps of 30 ms; a batch takes 15 ms to read, each twentieth 200 ms, of which the ring hides 30 ms a batch.

    The milliseconds are counted here, and the thread reads when they say it has read, so nothing depends on a clock.
    """
    done: list[int] = []  # when a batch was ready: its handful read, behind the one before, into slots that were free
    took = [300]  # when a batch was taken: the ring is full at first
    stalled = 0
    with TokenLoader(windows := Paced(tmp_path), 1, depth=depth) as loader, windows:
        for i in range(400):
            while len(done) < i + depth + EXCHANGED:
                j = len(done)
                if (freed := j - depth) >= len(took):  # the last of the handful whose slots these are was not taken yet
                    break
                free = took[freed] if freed > 0 else 0
                pause = sum(200 if k % 20 == 19 else 15 for k in range(j, j + EXCHANGED))
                done += [max(done[-1] if done else 0, free) + pause] * EXCHANGED
            now = max(took[-1] + 30, done[i])
            stalled += now - took[-1] - 30
            took.append(now)
            ready = sum(at <= now for at in done[i:])
            windows.allow(i + ready)
            until_ready(loader, ready)
            loader.next()
        assert stalled == 20 * max(0, 200 + 3 * 15 - 30 * (depth + 1))  # at the default, 8, nothing
        assert loader.stats()[:3] == (0.0, 0.0, 400)  # no next() found the ring empty when it should not have been


def test_a_wait_is_counted(tmp_path: Path) -> None:
    with TokenLoader(windows := Paced(tmp_path), 1) as loader, windows:
        threading.Timer(0.05, windows.allow, (EXCHANGED,)).start()
        loader.next()
        assert loader.stats().queue_wait_s > 0
        assert loader.stats().transfer_wait_s == 0  # there is nothing to transfer to


def test_a_slow_disk_is_told_what_comes_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch of this rank is announced once, four ahead at most, while the disk counts as slow."""
    faults, announced = 0, []

    class Slow(FolderWindows):
        def read(self, position: int, rows: Sequence[Tokens]) -> None:
            nonlocal faults
            faults += position == 42
            assert all(at <= position + 4 * 4 for at in announced)
            super().read(position, rows)

        def will_need(self, position: int, count: int) -> None:
            announced.append(position)
            super().will_need(position, count)

    monkeypatch.setattr("train.data.loader._reads_waited_for", lambda: faults)
    monkeypatch.setattr("train.data.loader.COLD", 10)
    with TokenLoader(Slow(counting_stream(tmp_path, [3000, 3000]), 10, 0), 2, world_size=2, rank=1) as loader:
        for _ in range(40):
            loader.next()
    assert announced == list(range(50, 82, 4))  # 46 is read at once, and from 82 on the disk is no longer slow


def test_an_error_in_the_thread_is_raised_by_next(tmp_path: Path) -> None:
    class Broken(FolderWindows):
        def read(self, position: int, rows: Sequence[Tokens]) -> None:
            raise OSError("the disk went away")

    with TokenLoader(Broken(counting_stream(tmp_path, [1000]), 10, 0), 1) as loader:
        for _ in range(2):
            with pytest.raises(OSError, match="the disk went away"):
                loader.next()


def test_what_was_read_before_an_error_is_delivered_before_it(tmp_path: Path) -> None:
    class Broken(FolderWindows):
        def read(self, position: int, rows: Sequence[Tokens]) -> None:
            if position == EXCHANGED + 2:
                raise OSError("the disk went away")
            super().read(position, rows)

    with TokenLoader(Broken(counting_stream(tmp_path, [1000]), 10, 0), 1) as loader:
        for _ in range(EXCHANGED + 2):
            loader.next()
        with pytest.raises(OSError, match="the disk went away"):
            loader.next()
        assert loader.position == EXCHANGED + 2


def test_the_thread_uses_the_gpu_of_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread begins on GPU 0; what it touches there takes memory of the process whose GPU that is."""
    current: dict[str, torch.device] = {}

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        current[threading.current_thread().name] = device
        yield

    class Sent(Slot):
        def send(self) -> None:
            on_which.append(current.get(threading.current_thread().name))

    on_which: list[torch.device | None] = []
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr("train.data.loader.SideStream", lambda _: Side())
    monkeypatch.setattr("train.data.loader.CudaSlot", lambda *size_and_place: Sent(*size_and_place[:3]))
    device = torch.device("cuda", 1)
    with TokenLoader(FolderWindows(counting_stream(tmp_path, [1000]), 10, 0), 1, device=device) as loader:
        until_ready(loader, DEPTH + EXCHANGED)
    assert on_which == [device] * (DEPTH + EXCHANGED)


class Side:
    """A side stream on which nothing was ever waited for."""

    def waited(self) -> float:
        return 0.0


def test_close_ends_the_thread(tmp_path: Path) -> None:
    loader = TokenLoader(FolderWindows(counting_stream(tmp_path, [1000]), 10, 0), 1)
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "loader"]


def test_a_split_too_small_for_one_window(tmp_path: Path) -> None:
    with complains(RefusedError, "10 tokens", "11"):
        FolderWindows(counting_stream(tmp_path, [10]), 10, 0)
