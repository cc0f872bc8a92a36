"""Windows from the page cache to the device, always a few batches ahead, so that the step never waits.

A thread fills a ring of preallocated slots with the windows the order names and sends them on their way. It announces
to the disk what comes next while the disk is what it waits for, and touches a slot again only when its copy is done.
Slots are exchanged four at a time, because synchronizing two threads for every batch costs as much as the batch.
"""

import queue
import threading
import time
from collections import deque
from contextlib import nullcontext
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from train.data.batch import Batch
from train.data.document_ends import ends_of
from train.data.staging import CudaSlot, SideStream, Slot
from train.data.windows import LoaderState, Windows

try:
    import resource
except ImportError:  # Windows, which cannot be told what will be read either
    resource = None  # type: ignore[assignment]

DEPTH = 8  # batches that are filled while four are read: hides a pause of 7 steps
EXCHANGED = 4  # slots: 1.4 times less CPU than one by one (Nov 2026)
AHEAD = 4  # batches announced to a disk that is slow: 20 to 40 times the speed of one that is not told (Nov 2026)
COLD = 256  # batches for which a disk is taken to be slow, once it was: announcing costs 1 us a window, as a copy does


class Stats(NamedTuple):
    """Since the loader was made: seconds `next()` waited for a filled slot, seconds the GPU waited for a copy, batches.

    `ready` is how many batches are filled at this moment.
    """

    queue_wait_s: float
    transfer_wait_s: float
    batches: int
    ready: int


class TokenLoader:
    """Batches of `batch_size` windows, from `position` (in windows) on, for ever.

    Rank r of `world_size` gets the r-th `batch_size` windows of every `batch_size * world_size`. Between two calls of
    `next()`, `position` is all there is to save: batch size and world size may change there without repeating or
    losing a window. With `documents`, each batch says where its documents end.
    """

    def __init__(
        self,
        windows: Windows,
        batch_size: int,
        *,
        position: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | None = None,
        depth: int = DEPTH,
        documents: bool = False,
    ) -> None:
        self.position, self.windows = position, windows
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self._device, self._documents = device or torch.device("cpu"), documents
        self._side = SideStream(self._device) if self._device.type == "cuda" else None
        self._slots = [self._allocate() for _ in range(depth + EXCHANGED)]
        self._queue_wait, self._batches, self._read = 0.0, 0, 0
        self._stop = threading.Event()
        self._free: queue.SimpleQueue[list[Slot] | None] = queue.SimpleQueue()
        self._filled: queue.SimpleQueue[list[Slot] | BaseException] = queue.SimpleQueue()
        self._ready: deque[Slot] = deque()  # the caller's, as `used` is: no other thread looks into them
        self._used: list[Slot] = []
        for i in range(0, len(self._slots), EXCHANGED):
            self._free.put(self._slots[i : i + EXCHANGED])
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
        self._thread.start()

    def next(self) -> Batch:
        """The next batch. Whatever went wrong in the thread is raised here."""
        while not self._ready:
            filled = self._next_filled()
            if isinstance(filled, BaseException):
                self._filled.put(filled)  # the thread is gone: every later call says the same
                raise filled
            self._ready.extend(filled)
        slot = self._ready.popleft()
        tokens = slot.deliver().to(self._device)
        documents = None if slot.boundaries is None else self._deliver_documents(slot.boundaries)
        self._used.append(slot)
        if len(self._used) == EXCHANGED:
            self._free.put(self._used)
            self._used = []
        self.position += self._batch_size * self._world_size
        self._batches += 1
        return Batch(tokens[:, :-1], tokens[:, 1:], documents)

    def stats(self) -> Stats:
        """What waiting there was. Nothing here waits for the device."""
        waited = self._side.waited() if self._side else 0.0
        return Stats(self._queue_wait, waited, self._batches, self._read - self._batches)

    def state(self) -> LoaderState:
        """What to save, to resume after the last batch delivered: see windows.position_of."""
        return self.windows.state(self.position)

    def close(self) -> None:
        """Stop the thread; a loader that was closed has no next()."""
        self._stop.set()
        self._free.put(None)
        self._thread.join()
        for slot in self._slots:
            slot.drain()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _allocate(self) -> Slot:
        size = self._batch_size, self.windows.seq_len, self.windows.dtype
        return CudaSlot(*size, self._device, self._side) if self._side else Slot(*size)

    def _next_filled(self) -> list[Slot] | BaseException:
        """A wait is counted only where there is one: filled slots cost no look at the clock."""
        try:
            return self._filled.get_nowait()
        except queue.Empty:
            began = time.perf_counter()
            filled = self._filled.get()
            self._queue_wait += time.perf_counter() - began
            return filled

    def _deliver_documents(self, boundaries: NDArray[np.int32]) -> torch.Tensor:
        ends = torch.from_numpy(boundaries)
        if self._side:
            ends = ends.pin_memory()  # torch's own pool, which keeps it until the copy is done
        return ends.to(self._device, non_blocking=True)

    def _run(self) -> None:
        try:
            # a thread begins on GPU 0, where its first call would open a context beside that of another process
            with torch.cuda.device(self._device) if self._side else nullcontext():
                self._fill()
        except BaseException as error:
            self._filled.put(error)

    def _fill(self) -> None:
        """The thread: from here on only numpy copies from the map, since they let other threads run during a read."""
        windows, count, stride = self.windows, self._batch_size, self._batch_size * self._world_size
        position = announced = cold_until = self.position + self._rank * count
        faults = _reads_waited_for()
        while slots := self._free.get():
            filled: list[Slot] = []
            try:
                for slot in slots:
                    if self._stop.is_set():
                        return
                    announced = max(announced, position + stride)
                    while announced < min(cold_until, position + (AHEAD + 1) * stride):
                        windows.will_need(announced, count)
                        announced += stride
                    slot.reclaim()
                    windows.read(position, slot.rows)
                    if (found := _reads_waited_for()) > faults:
                        faults, cold_until = found, position + COLD * stride
                    if self._documents:
                        boundaries = windows.boundaries(position, np.arange(count))
                        slot.boundaries = ends_of(boundaries, count, windows.seq_len, windows.documents_per_window)
                    slot.send()
                    position += stride
                    filled.append(slot)
            finally:  # what was read before something went wrong is delivered before it is raised
                self._filled.put(filled)
                self._read += len(filled)


def _reads_waited_for() -> int:
    """How often this thread (or process, where threads are not counted) has waited for a page to come from the disk."""
    if resource is None:
        return 0
    return resource.getrusage(getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)).ru_majflt
