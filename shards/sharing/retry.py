"""Asking again while a failure may pass: how often, after how long a wait, and what is said meanwhile."""

import random
import time
from collections.abc import Callable

from shards.errors import NetworkError

TRIES = 5  # in a row without any progress
BACKOFF = 1.0  # seconds before the second try, doubled each time, jittered
PASSING = {408, 425, 429, 500, 502, 503, 504}  # statuses that another try may not meet again
SAID_SECONDS = 10.0  # a wait as long as this, or tries that have lasted as long, are said

Note = Callable[[str], None]


class Retries:
    """The tries of one question, which `what` names in messages. Waiting ends early when `is_over`."""

    def __init__(self, what: str, is_over: Callable[[], bool] = lambda: False, note: Note = lambda _: None) -> None:
        self._what, self._is_over, self._note = what, is_over, note
        self._failures, self._said = 0, time.monotonic()

    def progress(self) -> None:
        """Something came: the next failure is the first one again."""
        self._failures = 0

    def wait(self, error: Exception, reason: str, after: float | None = None) -> None:
        """Wait before the next try, `after` seconds if the server named a time. NetworkError when it was the last."""
        self._failures += 1
        if self._failures == TRIES:
            raise NetworkError(
                f"{self._what}: {reason} ({TRIES} times in a row)",
                "what has arrived is kept",
                "check the address and the network, then run the same command again to resume",
            ) from error
        seconds = BACKOFF * 2.0 ** (self._failures - 1) * random.uniform(0.5, 1.0) if after is None else after
        now = time.monotonic()
        if seconds >= SAID_SECONDS or now - self._said > SAID_SECONDS:
            self._said = now
            self._note(f"{self._what}: {reason}; asking again in {seconds:.0f} s")
        while time.monotonic() < now + seconds and not self._is_over():
            time.sleep(min(0.1, seconds))


def reason_of(error: Exception) -> str:
    """The first line of what the innermost error says."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
