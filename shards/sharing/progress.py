"""How far a transfer is, said every few seconds: of one file and of all that are to come."""

import threading
import time
from collections.abc import Callable

from shards.numbers import clock, size
from shards.sharing.retry import Note

SECONDS = 10.0  # between two lines


class Progress:
    """Of several files, `nbytes` in all; several threads may tell it at once."""

    def __init__(self, nbytes: int, note: Note) -> None:
        self._nbytes, self._note, self._lock = nbytes, note, threading.Lock()
        self._files: dict[str, int] = {}  # bytes that are here
        self._now = 0  # bytes that came since it began
        self._began = self._said = time.monotonic()

    def found(self, name: str, nbytes: int) -> None:
        """The file is here, and need not be fetched."""
        with self._lock:
            self._files[name] = nbytes

    def of(self, name: str, nbytes: int) -> Callable[[int, bool], None]:
        """What the transfer of a file of so many bytes calls: with how many, and whether they came now or before."""

        def came(more: int, now: bool) -> None:
            with self._lock:
                self._files[name] = self._files.get(name, 0) + more
                self._now += more if now else 0
                said = self._line(name, nbytes) if now else ""
            if said:
                self._note(said)

        return came

    def _line(self, name: str, nbytes: int) -> str:
        """How far the file and all of them are; "" when something was said a moment ago."""
        at = time.monotonic()
        if at - self._said < SECONDS:
            return ""
        self._said = at
        rate, here, all_here = self._now / (at - self._began), self._files[name], sum(self._files.values())
        line = f"{name}: {size(here)} of {size(nbytes)}, {size(rate)}/s, {clock((nbytes - here) / rate)} left"
        if self._nbytes <= nbytes:
            return line
        return (
            f"{line}; in all {size(all_here)} of {size(self._nbytes)}, {clock((self._nbytes - all_here) / rate)} left"
        )
