"""What a run reports on the way: one type for each kind of event, shown by the terminal and by trackers."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from train.telemetry.metrics import Row


class Started(NamedTuple):
    """Training begins at `step` of `steps`. A step is `processes` x `accumulation` x `micro_batch` sequences."""

    family: str
    parameters: int
    device: str
    precision: str
    steps: int
    step: int
    batch_tokens: int
    last_batch_tokens: int
    micro_batch: int
    accumulation: int
    processes: int
    seq_len: int
    epoch_tokens: int
    flops_per_token: int
    peak_flops: float
    peak_source: str


class Logged(NamedTuple):
    """A row of metrics.jsonl was written; the rest of the run takes about `eta_seconds`."""

    row: Row
    steps: int
    eta_seconds: float


class Evaluated(NamedTuple):
    """The row of an evaluation was written to metrics.jsonl."""

    row: Row


class Sampled(NamedTuple):
    """A row of samples.jsonl was written."""

    step: int
    prompt: str
    text: str


class Saved(NamedTuple):
    """A checkpoint was published."""

    step: int
    path: Path


class RolledBack(NamedTuple):
    """After step `bad` the run went back to `step`; the windows from the first of `skipped` up to the second are not
    learned from."""

    step: int
    bad: int
    skipped: tuple[int, int]
    reason: str


class Ended(NamedTuple):
    """The last step is done. `summary` is what the whole run took, as Meter.summary has it."""

    step: int
    tokens: int
    graphs: int
    summary: Row


Event = Started | Logged | Evaluated | Sampled | Saved | RolledBack | Ended
Report = Callable[[Event], None]
