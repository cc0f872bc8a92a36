"""A whole run in one call, and reports that break it off."""

import math

from train.events import Event, Report
from train.job import Job, Result
from train.loop import train
from train.session import Session


class Stopped(Exception):
    """What a test breaks a run off with."""


def unheard(_event: Event) -> None:
    """Nobody listens."""


def trained(job: Job, report: Report = unheard, *, until: float = math.inf) -> Result:
    """The whole run, or the rest of it."""
    return train(Session(job), report, until)


def step_in(event: Event) -> int:
    """The step that an event is of."""
    return int(event.row["step"] if hasattr(event, "row") else event.step)


def stop_at(step: int, kind: type[Event]) -> Report:
    """Break off at the first event of this kind at `step` or later."""

    def report(event: Event) -> None:
        if isinstance(event, kind) and step_in(event) >= step:
            raise Stopped

    return report
