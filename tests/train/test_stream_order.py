"""The order of copies on a simulated GPU, which does everything as late, or as early, as the events allow.

Streams are queues whose work is done in an order drawn by chance, and what is copied is read when the copy is done, not
when it was asked for. A wait that is missing shows as a batch of other tokens.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from train.data import staging
from train.data.staging import CudaSlot, SideStream

ROWS, WIDTH = 2, 5


class Gpu:
    """Streams of work that is not done yet; `run` does some of it, by chance."""

    def __init__(self, seed: int) -> None:
        self.chance, self.streams = random.Random(seed), list[Stream]()
        self.current = [Stream(self)]  # the one that computes

    def run(self, until: Callable[[], bool] | None = None) -> None:
        """Do what is ready, by chance; with `until`, go on until it says so."""
        while not (until() if until else self.chance.random() < 0.3):
            ready = [stream for stream in self.streams if stream.work and stream.work[0][0]()]
            if not ready:
                assert until is None, "the GPU waits for ever"
                return
            self.chance.choice(ready).work.popleft()[1]()

    @contextmanager
    def within(self, stream: "Stream") -> Iterator[None]:
        self.current.append(stream)
        yield
        self.current.pop()


class Stream:
    """Work in order: whether it may begin, and what it does."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.work = gpu, deque[tuple[Callable[[], bool], Callable[[], object]]]()
        gpu.streams.append(self)

    def add(self, do: Callable[[], object], ready: Callable[[], bool] = lambda: True) -> None:
        self.work.append((ready, do))

    def wait_event(self, event: "Event") -> None:
        marks = event.marks  # what was recorded until now, as CUDA has it
        self.add(lambda: None, lambda: event.done >= marks)


class Event:
    def __init__(self, **_: bool) -> None:
        self.marks = self.done = 0

    def record(self, stream: Stream) -> None:
        self.marks += 1
        self.gpu = stream.gpu
        stream.add(lambda mark=self.marks: setattr(self, "done", mark))

    def query(self) -> bool:
        return self.done == self.marks

    def elapsed_time(self, _: "Event") -> float:
        return 0.0

    def synchronize(self) -> None:
        if self.marks:
            self.gpu.run(self.query)


class OnGpu:
    """A tensor whose values are there only when the work that makes them is done."""

    def __init__(self, gpu: Gpu, array: np.ndarray[Any, Any]) -> None:
        self.gpu, self.array, self.shape, self.dtype = gpu, array, array.shape, array.dtype

    def copy_(self, host: "Pinned", non_blocking: bool) -> None:
        assert non_blocking
        self.gpu.current[-1].add(lambda: self.array.__setitem__(..., host.array))

    def to(self, _: torch.dtype) -> "OnGpu":
        wide = OnGpu(self.gpu, np.full(self.shape, -1, np.int64))
        self.gpu.current[-1].add(lambda: wide.array.__setitem__(..., self.array))
        return wide

    def bitwise_and_(self, mask: int) -> "OnGpu":
        self.gpu.current[-1].add(lambda: self.array.__iand__(mask))
        return self


class Pinned:
    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape, self.dtype, self.array = shape, torch.int16, np.zeros(shape, np.int16)

    def numpy(self) -> np.ndarray[Any, Any]:
        return self.array


def simulated(gpu: Gpu) -> SimpleNamespace:
    """The part of torch that staging.py speaks to."""

    def empty(shape: tuple[int, int], pin_memory: bool = False, **_: object) -> Pinned | OnGpu:
        return Pinned(shape) if pin_memory else OnGpu(gpu, np.full(shape, -7, np.int16))

    cuda = SimpleNamespace(
        Stream=lambda _: Stream(gpu), Event=Event, stream=gpu.within, current_stream=lambda _: gpu.current[-1]
    )
    return SimpleNamespace(empty=empty, cuda=cuda, int16=torch.int16, int32=torch.int32, int64=torch.int64)


def wrong_batches(monkeypatch: pytest.MonkeyPatch, seed: int, batches: int = 60, ring: int = 3) -> int:
    """Of so many batches, how many are not what was read, when loader and model take turns by chance."""
    gpu = Gpu(seed)
    monkeypatch.setattr(staging, "torch", simulated(gpu))
    device = torch.device("cuda", 0)
    side = SideStream(device)
    free = deque(CudaSlot(ROWS, WIDTH - 1, np.dtype("<u2"), device, side) for _ in range(ring))
    filled, got, sent = deque[CudaSlot](), list[Any](), 0
    while len(got) < batches:
        gpu.run()
        if free and sent < batches and gpu.chance.random() < 0.5:
            slot = free.popleft()
            slot.reclaim()
            for row in slot.rows:
                row[...] = 60_000 + sent
            slot.send()
            filled.append(slot)
            sent += 1
        elif filled:
            slot = filled.popleft()
            got.append(slot.deliver())
            free.append(slot)
    gpu.run(lambda: not any(stream.work for stream in gpu.streams))
    return sum(bool((each.array != 60_000 + number).any()) for number, each in enumerate(got))


def test_every_batch_is_what_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum(wrong_batches(monkeypatch, seed) for seed in range(200)) == 0


@pytest.mark.parametrize("what", ["reclaim", "hold", "no wait", "wrong event"])
def test_a_wait_that_is_missing_is_found(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    def send(slot: CudaSlot) -> None:
        with staging.torch.cuda.stream(slot._side.stream):
            if what == "wrong event":
                slot._side.stream.wait_event(slot._copied)
            slot._narrow.copy_(slot._signed, non_blocking=True)
            slot._copied.record(slot._side.stream)

    if what == "reclaim":
        monkeypatch.setattr(CudaSlot, "reclaim", lambda _: None)
    elif what == "hold":
        monkeypatch.setattr(SideStream, "hold", lambda *_: None)
    else:
        monkeypatch.setattr(CudaSlot, "send", send)
    assert sum(wrong_batches(monkeypatch, seed) for seed in range(50)) > 0
