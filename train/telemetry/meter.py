"""What the steps between two log rows cost: what a clock or a gauge says, and is no result."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import NamedTuple, Self

import torch

from train.config import ModelConfig
from train.data.loader import Stats
from train.machine.device import memory_used
from train.telemetry.flops import flops_per_token, peak
from train.telemetry.metrics import Row
from train.telemetry.power import GpuPower

JOULES_A_KWH = 3.6e6
GAUGES = (  # the fields of a row that a clock or a sensor says, different in each run
    *("tok_per_s", "mfu_percent", "data_wait_ms", "transfer_wait_ms", "step_ms", "stall_percent"),
    *("memory_gb", "watts", "energy_kwh", "cost"),
)


class _Mark(NamedTuple):
    seconds: float
    step: int
    tokens: int
    stats: Stats
    joules: float | None


class Meter:
    """Measures from one row to the next. What is paused (evaluation, samples, saves) is in no row's rate.

    `power` is closed at its own end; `kwh_price` is of one kWh, 0 where it is not known. Rates are of all `processes`,
    memory is that of this one. `seconds` and `kwh` include those of the checkpoint that a run resumes from.
    """

    def __init__(
        self,
        model: ModelConfig,
        vocab_size: int,
        device: torch.device,
        precision: torch.dtype,
        power: GpuPower | None = None,
        kwh_price: float = 0.0,
        processes: int = 1,
    ) -> None:
        self.flops_per_token = flops_per_token(model, vocab_size)
        self.peak = peak(device, precision)
        self._peak_flops = processes * self.peak.flops
        self._device, self._power, self._kwh_price = device, power, kwh_price
        self._began = time.perf_counter()
        self._seconds_before = self._kwh_before = self._paused = 0.0
        self._most_memory = 0

    def add_earlier(self, seconds: float, kwh: float) -> None:
        """Add to what was spent before the restart."""
        self._seconds_before, self._kwh_before = seconds, kwh

    def begin(self, step: int, tokens: int, stats: Stats) -> None:
        """The first row measures from here."""
        memory_used(self._device)
        self._mark = _Mark(time.perf_counter(), step, tokens, stats, self._joules())
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
        is the share of the time that both are. `memory_gb` is the most that was allocated on a GPU, and the process's
        RSS without one. `watts` is the mean since the row before, pauses included; `energy_kwh` and `cost` are the
        run's so far. They are absent where no GPU reports them.
        """
        before, self._mark = self._mark, _Mark(time.perf_counter(), step, tokens, stats, self._joules())
        whole = self._mark.seconds - before.seconds
        seconds = whole - self._paused
        self._paused = 0.0
        queue_wait = stats.queue_wait_s - before.stats.queue_wait_s
        transfer_wait = stats.transfer_wait_s - before.stats.transfer_wait_s
        steps = step - before.step
        tok_per_s = (tokens - before.tokens) / seconds
        memory = memory_used(self._device)
        self._most_memory = max(self._most_memory, memory)
        row: Row = {
            "tok_per_s": round(tok_per_s, 1),
            "mfu_percent": round(100 * tok_per_s * self.flops_per_token / self._peak_flops, 2),
            "data_wait_ms": round(1000 * queue_wait / steps, 4),
            "transfer_wait_ms": round(1000 * transfer_wait / steps, 4),
            "step_ms": round(1000 * seconds / steps, 2),
            "stall_percent": round(100 * (queue_wait + transfer_wait) / seconds, 4),
            "memory_gb": round(memory / 1e9, 3),
        }
        if self._mark.joules is not None and before.joules is not None:
            row["watts"] = round((self._mark.joules - before.joules) / whole, 1)
        return {**row, **self._energy()}

    @property
    def seconds(self) -> float:
        """Of the run so far, everything in it."""
        return self._seconds_before + time.perf_counter() - self._began

    @property
    def kwh(self) -> float:
        """Of the run so far, as far as it is known."""
        return self._kwh_before + (self._joules() or 0.0) / JOULES_A_KWH

    def summary(self, tokens: int) -> Row:
        """The whole run's `hours`, mean `tok_per_s` (evaluations and saves included), memory and energy."""
        seconds = self.seconds
        return {
            "hours": round(seconds / 3600, 4),
            "tok_per_s": round(tokens / seconds, 1),
            "memory_gb": round(self._most_memory / 1e9, 3),
            **self._energy(),
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._power:
            self._power.close()
        self._power = None

    def _joules(self) -> float | None:
        return self._power.joules() if self._power else None

    def _energy(self) -> Row:
        if self._joules() is None:
            return {}
        kwh = self.kwh
        price = {"cost": round(kwh * self._kwh_price, 4)} if self._kwh_price else {}
        return {"energy_kwh": round(kwh, 6), **price}
