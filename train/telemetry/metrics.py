"""metrics.jsonl and samples.jsonl: one JSON object a line, appended as the run goes, cut back when it is resumed."""

import os
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import msgspec

from shards.atomic import publish_bytes
from shards.errors import CorruptError, from_os_error

Row = dict[str, Any]


class RowLog:
    """A file of rows that each have a `step`. Rows after `last_step` are dropped: that part of the run comes again.

    So are the rows of `last_step` that have the field `repeated`, which come again as well; "" when none do.
    """

    def __init__(self, path: Path, last_step: int, repeated: str) -> None:
        self.path = path
        self._file = self._cut(last_step, repeated)

    def write(self, row: Row) -> None:
        """Append one row, visible to readers at once. Its numbers are finite: JSON has no NaN."""
        try:
            self._file.write(_line(row))
            self._file.flush()
        except OSError as error:
            raise from_os_error(error, self.path, "written") from error

    def cut_back(self, last_step: int) -> None:
        """Drop the rows after `last_step`, since the run goes back to it."""
        self._file.close()
        self._file = self._cut(last_step)

    def sync(self) -> None:
        """Make all rows durable; a checkpoint must never outlive the rows that led to it."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise from_os_error(error, self.path, "written") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _cut(self, last_step: int, repeated: str = "") -> BinaryIO:
        lines = _lines(self.path)
        needed = [number for number, row in lines if row is not None and row["step"] <= last_step]
        rows = [_whole(self.path, number, row) for number, row in lines if needed and number <= needed[-1]]
        kept = [row for row in rows if row["step"] < last_step or (row["step"] == last_step and repeated not in row)]
        publish_bytes(self.path, b"".join(map(_line, kept)))
        return self.path.open("ab")


class NoLog(RowLog):
    """What the processes have that write nothing: another one writes the rows."""

    def __init__(self) -> None: ...

    def write(self, row: Row) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def cut_back(self, last_step: int) -> None:
        """Nothing."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def read_rows(path: Path) -> list[Row]:
    """The complete rows of a file; none when there is no file. A last line cut short by a kill is left out."""
    return [_whole(path, number, row) for number, row in _lines(path)]


def _lines(path: Path) -> list[tuple[int, Row | None]]:
    """The number of each line and the row in it, None for what is not a row with a step, as a last line cut short.

    Rows that were not made durable may come back from a power cut as anything, also with a complete row after them.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise from_os_error(error, path, "read") from error
    return [(number, _row(line)) for number, line in enumerate(lines, 1)]


def _row(line: bytes) -> Row | None:
    try:
        row = msgspec.json.decode(line, type=Row)
        return {**row, "step": int(row["step"])}
    except (ValueError, KeyError, TypeError):
        return None


def _whole(path: Path, number: int, row: Row | None) -> Row:
    if row is None:
        raise CorruptError(
            f"{path}: line {number} is not a row with a step", "it was damaged or edited", "remove that line"
        )
    return row


def _line(row: Row) -> bytes:
    return msgspec.json.encode(row) + b"\n"
