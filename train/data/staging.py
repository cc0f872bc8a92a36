"""The memory a batch passes through on its way to the model: two bytes a token, widened to int64 where the model is.

A slot is filled, sent, delivered and filled again, in that order. What it was must have left it before: on CUDA that is
what an event says, never the order in which the calls were made.
"""

from collections import deque

import numpy as np
import torch
from numpy.typing import NDArray

from shards.reader import Tokens


class Slot:
    """(batch_size, seq_len + 1) tokens in host memory; `rows` are its windows, `boundaries` what came with them."""

    def __init__(
        self, batch_size: int, seq_len: int, dtype: np.dtype[np.unsignedinteger], pinned: bool = False
    ) -> None:
        # torch has no arithmetic for uint16: numpy fills this memory as unsigned, torch moves it as signed
        signed = torch.int16 if dtype.itemsize == 2 else torch.int32
        self._signed = torch.empty((batch_size, seq_len + 1), dtype=signed, pin_memory=pinned)
        self._unsigned: Tokens = self._signed.numpy().view(dtype)
        self.rows: list[Tokens] = list(self._unsigned)
        self.boundaries: NDArray[np.int32] | None = None

    def reclaim(self) -> None:
        """Wait until nothing reads the slot's host memory any more."""

    def send(self) -> None:
        """Begin to move what `rows` hold to the device."""

    def deliver(self) -> torch.Tensor:
        """The tokens, int64, on the device and the caller's own."""
        return torch.from_numpy(self._unsigned.astype(np.int64))

    def drain(self) -> None:
        """Wait until nothing uses any of the slot's memory."""


class SideStream:
    """The CUDA stream that copies to `device` beside the one that computes, and how long that one waited for it."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._waited = 0.0
        self._waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def hold(self, compute: torch.cuda.Stream, copied: torch.cuda.Event) -> None:
        """Let `compute` continue when `copied` has happened. The host does not wait."""
        began = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        ended = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        began.record(compute)
        compute.wait_event(copied)
        ended.record(compute)
        self._waits.append((began, ended))
        self.waited()

    def waited(self) -> float:
        """Seconds the GPU has stood still for a copy, as far as it has come; a wait for nothing measures some us."""
        while self._waits and self._waits[0][1].query():  # type: ignore[no-untyped-call]
            began, ended = self._waits.popleft()
            self._waited += began.elapsed_time(ended) / 1000
        return self._waited


class CudaSlot(Slot):
    """A pinned slot and its place on the GPU. The loader's thread sends, the model's thread delivers."""

    def __init__(
        self, batch_size: int, seq_len: int, dtype: np.dtype[np.unsignedinteger], device: torch.device, side: SideStream
    ) -> None:
        super().__init__(batch_size, seq_len, dtype, pinned=True)
        self._device, self._side = device, side
        self._mask = 2 ** (8 * dtype.itemsize) - 1
        self._narrow = torch.empty(self._signed.shape, dtype=self._signed.dtype, device=device)
        self._copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._widened = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._widened.record(torch.cuda.current_stream(device))  # whoever had this memory before must be done with it

    def reclaim(self) -> None:
        """Wait until the copy out of the pinned memory has happened."""
        self._copied.synchronize()

    def send(self) -> None:
        """Queue the copy behind the widening of what the place on the GPU held."""
        with torch.cuda.stream(self._side.stream):
            self._side.stream.wait_event(self._widened)
            self._narrow.copy_(self._signed, non_blocking=True)
            self._copied.record(self._side.stream)

    def deliver(self) -> torch.Tensor:
        """The tokens, int64, widened on the current stream behind their copy."""
        compute = torch.cuda.current_stream(self._device)
        self._side.hold(compute, self._copied)
        tokens = self._narrow.to(torch.int64).bitwise_and_(self._mask)
        self._widened.record(compute)
        return tokens

    def drain(self) -> None:
        """Wait for the copy and the widening: memory that is given back belongs to no stream any more."""
        self._copied.synchronize()
        self._widened.synchronize()
