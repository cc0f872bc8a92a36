"""Ctrl-C and SIGTERM, heard in the middle of a step and obeyed at its end."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from shards.errors import Interrupted

logger = logging.getLogger(__name__)


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """A list that SIGINT and SIGTERM are added to, so that a step is finished and saved; a second one ends at once."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def catch(signum: int, _frame: object) -> None:
        if caught:
            raise Interrupted(signum, "ended at once; the checkpoint before is kept")
        caught.append(signum)
        logger.warning("%s: saving after this step; once more to quit now", signal.Signals(signum).name)

    before = {signum: signal.signal(signum, catch) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
