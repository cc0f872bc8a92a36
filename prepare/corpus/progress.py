"""How far a download is, said every few seconds: of one file and of all that are wanted."""

import threading
import time
from collections.abc import Callable

from shards.sharing.retry import Note

SECONDS = 10.0  # between two lines


class Progress:
    """Of all files of a corpus that are wanted, `nbytes` in all; several threads may tell it at once."""

    def __init__(self, nbytes: int, note: Note) -> None:
        self._nbytes, self._note, self._lock = nbytes, note, threading.Lock()
        self._files: dict[str, int] = {}  # bytes that are here
        self._now = 0  # bytes that came since it began
        self._began = self._said = time.monotonic()

    def found(self, name: str, nbytes: int) -> None:
        """The file is here, and need not be fetched."""
        with self._lock:
            self._files[name] = nbytes

    def of(self, name: str, size: int) -> Callable[[int, bool], None]:
        """What a download of the file calls with bytes: how many, and whether they came now or were left before."""

        def came(nbytes: int, now: bool) -> None:
            with self._lock:
                self._files[name] = self._files.get(name, 0) + nbytes
                self._now += nbytes if now else 0
                said = self._line(name, size) if now else ""
            if said:
                self._note(said)

        return came

    def _line(self, name: str, size: int) -> str:
        """How far the file and all of them are; "" when something was said a moment ago."""
        at = time.monotonic()
        if at - self._said < SECONDS:
            return ""
        self._said = at
        rate, here, whole = self._now / (at - self._began), self._files[name], sum(self._files.values())
        in_all = ""
        if self._nbytes > size:
            in_all = f"; in all {_size(whole)} of {_size(self._nbytes)}, {_clock((self._nbytes - whole) / rate)} left"
        left = _clock((size - here) / rate)
        return f"{name}: {_size(here)} of {_size(size)}, {rate / 1e6:.1f} MB/s, {left} left{in_all}"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(max(0.0, seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"
