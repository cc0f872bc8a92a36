"""What the steps between two log rows cost: what a clock or a gauge says, and is no result."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from train.loader import Stats
from train.metrics import Row


class _Mark(NamedTuple):
    seconds: float
    step: int
    tokens: int
    stats: Stats


class Meter:
    """Measures from one row to the next. What is paused (evaluation, samples, saves) is in no row."""

    def __init__(self, step: int, tokens: int, stats: Stats) -> None:
        self._mark = _Mark(time.perf_counter(), step, tokens, stats)
        self._paused = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not the steps'."""
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    def read(self, step: int, tokens: int, stats: Stats) -> Row:
        """The row's part, for the steps since the one before; call it when the device has finished them.

        `data_wait_ms` and `transfer_wait_ms` are a step's mean wait for a filled slot and for its copy; `stall_percent`
        is the share of the time that both are.
        """
        before, self._mark = self._mark, _Mark(time.perf_counter(), step, tokens, stats)
        seconds = self._mark.seconds - before.seconds - self._paused
        self._paused = 0.0
        queue_wait = stats.queue_wait_s - before.stats.queue_wait_s
        transfer_wait = stats.transfer_wait_s - before.stats.transfer_wait_s
        steps = step - before.step
        return {
            "tok_per_s": round((tokens - before.tokens) / seconds, 1),
            "data_wait_ms": round(1000 * queue_wait / steps, 4),
            "transfer_wait_ms": round(1000 * transfer_wait / steps, 4),
            "step_ms": round(1000 * seconds / steps, 2),
            "stall_percent": round(100 * (queue_wait + transfer_wait) / seconds, 4),
        }
