"""The rows of metrics.jsonl, shown in TensorBoard, Weights & Biases or trackio as well.

metrics.jsonl is the truth and these are its mirrors: one that fails is closed, and the run continues.
"""

import logging
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from importlib.util import find_spec
from types import TracebackType
from typing import Any, Protocol, Self, assert_never

import msgspec

from pipeline.config import Recipe
from pipeline.home.layout import RunPaths
from shards.errors import HostError
from train.config import TrackerName
from train.events import Evaluated, Event, Logged, Started

logger = logging.getLogger(__name__)
Row = dict[str, Any]
PROJECT = "millpond"


class Tracker(Protocol):
    """One mirror of one run."""

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Show the numbers of one row."""

    def close(self) -> None:
        """The process ends: send what is left."""


def require(names: tuple[TrackerName, ...]) -> None:
    """HostError unless the packages of all trackers are installed; nothing is loaded."""
    for name in names:
        if find_spec(name) is None:
            raise HostError(
                f"train.trackers has {name}, which is not installed",
                "metrics.jsonl is written in any case",
                f".venv/bin/pip install -c constraints.txt -e '.[{name}]', or leave it out of train.trackers",
            )


class Trackers:
    """All trackers of a run. `training` takes the events of the training loop, and opens them when it starts."""

    def __init__(self, names: tuple[TrackerName, ...], run: RunPaths, recipe: Recipe) -> None:
        self._names, self._run, self._recipe = names, run, recipe
        self._open: dict[TrackerName, Tracker] = {}

    def training(self, event: Event) -> None:
        """One event; what is shown are the rows of metrics.jsonl."""
        if isinstance(event, Started):
            for name in self._names:
                self._try(name, partial(self._begin, name, event.step))
        elif isinstance(event, Logged | Evaluated):
            row = event.row
            numbers = {key: float(value) for key, value in row.items() if key != "step" and _is_number(value)}
            for name, tracker in list(self._open.items()):
                self._try(name, partial(tracker.log, numbers, row["step"]))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, tracker in list(self._open.items()):
            self._try(name, tracker.close)
        self._open.clear()

    def _begin(self, name: TrackerName, step: int) -> None:
        kind: Callable[[RunPaths, dict[str, Any], int], Tracker]
        match name:
            case "tensorboard":
                kind = TensorBoard
            case "wandb":
                kind = WandB
            case "trackio":
                kind = Trackio
            case _:
                assert_never(name)
        self._open[name] = kind(self._run, msgspec.to_builtins(self._recipe), step)

    def _try(self, name: TrackerName, action: Callable[[], None]) -> None:
        try:
            with redirect_stdout(sys.stderr), warnings.catch_warnings():  # stdout is for results
                warnings.simplefilter("ignore")
                action()
        except Exception as error:
            self._open.pop(name, None)
            logger.warning("%s failed and is closed; the run continues: %s", name, error)


class TensorBoard:
    """Event files in the run's folder. Points after the step that a run resumes from are replaced."""

    def __init__(self, run: RunPaths, recipe: dict[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.tensorboard), purge_step=step + 1 if step else 0)

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Show the numbers of one row."""
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WandB:
    """The run of the same id. Its own steps only grow, so ours are a number of the row, and the axis of all others.

    The part of a run that comes again after a kill is sent twice, with the same numbers at the same places. A run that
    starts at 0 takes the place of one that had its name.
    """

    def __init__(self, run: RunPaths, recipe: dict[str, Any], step: int) -> None:
        import wandb

        self._run = wandb.init(
            project=PROJECT,
            id=run.root.name,
            name=run.root.name,
            dir=str(run.root),
            config=recipe,
            resume="allow" if step else None,
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Show the numbers of one row."""
        self._run.log({**numbers, "step": step})

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


class Trackio:
    """The run of the same name, in trackio's own database. What comes again is there twice, with the same numbers."""

    def __init__(self, run: RunPaths, recipe: dict[str, Any], step: int) -> None:
        import trackio

        self._trackio = trackio
        trackio.init(
            project=PROJECT,
            name=run.root.name,
            config=recipe,
            resume="allow" if step else "never",
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Show the numbers of one row."""
        self._trackio.log(numbers, step=step)

    def close(self) -> None:
        """Write what is left."""
        self._trackio.finish()


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
