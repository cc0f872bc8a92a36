"""Windows from the page cache to the device, always a few batches ahead, so that the step never waits.

A thread fills a ring of preallocated slots with the windows the order names, two bytes a token, pinned where there is
CUDA; they are widened to int64 on the device. A slot is used again only when the copy out of it has finished.
"""

import queue
import threading
import time
from collections import deque
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from shards.errors import RefusedError
from shards.reader import TokenStream
from train.order import WindowOrder

DEPTH = 8  # batches: hides a pause of 7 steps


class Batch(NamedTuple):
    """`inputs` and `targets`, each (B, T) int64 on the device; targets are the inputs one token later."""

    inputs: torch.Tensor
    targets: torch.Tensor


class _Slot(NamedTuple):
    """(B, T + 1) tokens: one memory that numpy fills as unsigned and torch copies as signed, having no such type."""

    unsigned: NDArray[np.unsignedinteger]
    signed: torch.Tensor


def window_count(tokens: int, seq_len: int) -> int:
    """How many windows of `seq_len` targets a stream has; window k starts at k * seq_len and shares its last token."""
    return max(0, (tokens - 1) // seq_len)


class TokenLoader:
    """Batches of `batch_size` windows of `stream`, in the order of `seed`, from `position` (in windows) on, for ever.

    Rank r of `world_size` gets the r-th `batch_size` windows of every `batch_size * world_size`. Between two calls of
    `next()`, `position` is all there is to save: batch size and world size may change there without repeating or
    losing a window.
    """

    def __init__(
        self,
        stream: TokenStream,
        seq_len: int,
        batch_size: int,
        seed: int,
        *,
        position: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | None = None,
        depth: int = DEPTH,
    ) -> None:
        self.position, self.windows = position, window_count(len(stream), seq_len)
        if not self.windows:
            raise RefusedError(
                f"the split has {len(stream):,} tokens, one window takes {seq_len + 1:,}",
                "",
                "prepare more text, or choose a smaller model.seq_len",
            )
        self.wait_seconds = 0.0  # how long next() has waited for a filled slot, in all
        self._stream, self._seq_len, self._batch_size = stream, seq_len, batch_size
        self._rank, self._world_size = rank, world_size
        self._order = WindowOrder(self.windows, seed)
        self._device = device or torch.device("cpu")
        self._mask = 2 ** (8 * stream.dtype.itemsize) - 1
        self._slots = [self._allocate() for _ in range(depth)]
        self._copying: deque[tuple[_Slot, torch.cuda.Event]] = deque()
        self._stop = threading.Event()
        self._free: queue.SimpleQueue[_Slot | None] = queue.SimpleQueue()
        self._filled: queue.SimpleQueue[_Slot | BaseException] = queue.SimpleQueue()
        for slot in self._slots:
            self._free.put(slot)
        self._thread = threading.Thread(target=self._fill, args=(position,), name="loader", daemon=True)
        self._thread.start()

    def next(self) -> Batch:
        """The next batch. Whatever went wrong in the thread is raised here."""
        began = time.perf_counter()
        slot = self._filled.get()
        self.wait_seconds += time.perf_counter() - began
        if isinstance(slot, BaseException):
            self._filled.put(slot)  # the thread is gone: every later call says the same
            raise slot
        self.position += self._batch_size * self._world_size
        if self._device.type == "cuda":
            tokens = self._to_cuda(slot)
        else:
            tokens = torch.from_numpy(slot.unsigned.astype(np.int64)).to(self._device)
            self._free.put(slot)
        return Batch(tokens[:, :-1], tokens[:, 1:])

    def close(self) -> None:
        """Stop the thread; a loader that was closed has no next()."""
        self._stop.set()
        self._free.put(None)
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _allocate(self) -> _Slot:
        signed = torch.empty(
            (self._batch_size, self._seq_len + 1),
            dtype=torch.int16 if self._stream.dtype.itemsize == 2 else torch.int32,
            pin_memory=self._device.type == "cuda",
        )
        return _Slot(signed.numpy().view(self._stream.dtype), signed)

    def _to_cuda(self, slot: _Slot) -> torch.Tensor:
        narrow = slot.signed.to(self._device, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        self._copying.append((slot, copied))
        while len(self._copying) > 1:  # the copy before this one: done by now unless the GPU is far behind
            earlier, event = self._copying.popleft()
            event.synchronize()
            self._free.put(earlier)
        return narrow.to(torch.int64).bitwise_and_(self._mask)

    def _fill(self, position: int) -> None:
        """The thread: from here on only numpy slices touch the map, since they let other threads run during a read."""
        try:
            position += self._rank * self._batch_size
            while (slot := self._free.get()) is not None and not self._stop.is_set():
                for row, window in zip(slot.unsigned, self._order.at(position, self._batch_size).tolist(), strict=True):
                    self._stream.read_into(window * self._seq_len, row)
                self._filled.put(slot)
                position += self._batch_size * self._world_size
        except BaseException as error:
            self._filled.put(error)
