"""Ctrl-C, SIGTERM and SIGHUP (a closed terminal), heard in the middle of a step and obeyed at its end."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from shards.errors import Interrupted

logger = logging.getLogger(__name__)


def ended_by() -> list[int]:
    """The signals that ask the process to end, Ctrl-C aside. SIGHUP is not among them where it is ignored, as under
    nohup."""
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    ignored = hangup is None or signal.getsignal(hangup) == signal.SIG_IGN
    return [signal.SIGTERM] if ignored or hangup is None else [signal.SIGTERM, hangup]


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """A list that these signals are added to, so that a step is finished and saved; a second one ends at once."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def catch(signum: int, _frame: object) -> None:
        if caught:
            raise Interrupted(signum, "ended at once; the checkpoint before is kept")
        caught.append(signum)
        logger.warning("%s: saving after this step; once more to quit now", signal.Signals(signum).name)

    before = {signum: signal.signal(signum, catch) for signum in (signal.SIGINT, *ended_by())}
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
