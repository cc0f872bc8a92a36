"""Which documents stay out: filters on a row's columns, documents that came before, documents that are forbidden."""

import hashlib
import operator
import re
from collections.abc import Callable, Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prepare.text.columns import Spelled
from shards.errors import ConfigError
from shards.reader import TokenFolder

LENGTH = "len(text)"  # in characters; the one name in a filter that is no column

_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_INTEGER = re.compile(r"[+-]?\d+", re.ASCII)
_MOST_DIGITS = 4000  # Python refuses to read integers of more than 4,300
_REAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|nan|[+-]?inf(inity)?", re.ASCII | re.IGNORECASE)
_FILTER = re.compile(r"""\s*(len\(text\)|[\w.-]+)\s*(>=|<=|==|!=|>|<)\s*(?:(-?\d+(?:\.\d+)?)|"([^"]*)")\s*""")


class Filter(NamedTuple):
    """One condition that a row must meet: `int_score >= 3`, `language == "en"`, `len(text) >= 200`."""

    text: str
    column: str
    holds: Callable[[Any, Any], bool]
    value: int | float | str

    def keeps(self, values: Iterable[Any]) -> NDArray[np.bool_]:
        """For each value whether it meets the condition; null and NaN never do. ConfigError for another type."""
        wanted = str if isinstance(self.value, str) else (int, float, Decimal)
        kept = []
        for value in values:
            if isinstance(value, Spelled) and wanted is not str:
                value = _number(value)
            elif isinstance(value, Decimal) and isinstance(self.value, float):
                value = float(value)  # a Decimal equals no float that is not exactly it: 0.1 would never be 0.1
            if value is None or value != value:
                kept.append(False)
            elif isinstance(value, wanted):
                kept.append(self.holds(value, self.value))
            else:
                shown = repr(value) if len(repr(value)) < 100 else f"{repr(value)[:80]}..."
                raise ConfigError(
                    f"corpus.filters: {self.text!r} compares {shown} of column {self.column!r} with {self.value!r}",
                    'numbers are compared with numbers, text with text in quotes: language == "en"',
                    "fix the filter",
                )
        return np.array(kept, np.bool_)


def _number(field: Spelled) -> int | float | str:
    """The number that a field of a csv file spells; the field itself when it spells none."""
    text = field.strip()
    if _INTEGER.fullmatch(text) and len(text) <= _MOST_DIGITS:
        return int(text)
    return float(text) if _REAL.fullmatch(text) else str(field)


def parse_filters(texts: Iterable[str]) -> list[Filter]:
    """The filters that `texts` spell. ConfigError for one that cannot be read."""
    found = []
    for text in texts:
        match = _FILTER.fullmatch(text)
        if match is None:
            raise ConfigError(
                f"corpus.filters: {text!r} is not a condition",
                'one is COLUMN OPERATOR VALUE, as in int_score >= 3, language == "en" or len(text) >= 200',
                "fix the filter",
            )
        column, sign, number, word = match.groups()
        value = word if number is None else float(number) if "." in number else int(number)
        spelled = f"{column} {sign} " + (f'"{word}"' if number is None else number)  # however it was spaced
        found.append(Filter(spelled, column, _COMPARISONS[sign], value))
    return found


class HashFilter:
    """What is dropped by its hash: `forbidden` documents, those that came `before`, and repetitions if `dedup`.

    `forbidden` and `before` are sorted uint64 arrays of xxh3-64 hashes.
    """

    def __init__(self, forbidden: NDArray[np.uint64], before: NDArray[np.uint64], *, dedup: bool) -> None:
        self._forbidden, self._before = forbidden, before
        self._seen: set[int] | None = set() if dedup else None

    def __call__(self, hashes: NDArray[np.uint64]) -> list[tuple[str, NDArray[np.bool_]]]:
        """For each reason which of the documents it drops; every document has at most one."""
        forbidden = contains(self._forbidden, hashes)
        repeated = contains(self._before, hashes) & ~forbidden
        if self._seen is not None:
            for i, key in enumerate(hashes.tolist()):
                repeated[i] |= key in self._seen and not forbidden[i]
                self._seen.add(key)
        return [("forbidden", forbidden), ("duplicate", repeated)]


def contains(table: NDArray[np.uint64], hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """For each of `hashes` whether it is in the sorted `table`."""
    if not len(table):
        return np.zeros(len(hashes), np.bool_)
    at = np.minimum(np.searchsorted(table, hashes), len(table) - 1)
    return np.asarray(table[at] == hashes)


def forbidden_hashes(folders: Iterable[Path]) -> NDArray[np.uint64]:
    """The sorted hashes of every validation document of these token folders."""
    found = [shard.documents["hash"] for path in folders for shard in TokenFolder(path).shards("val")]
    return np.unique(np.concatenate([np.empty(0, np.uint64), *found]))


def digest_of(hashes: NDArray[np.uint64]) -> str:
    """The sha256 of a list of hashes, for a fingerprint."""
    return hashlib.sha256(hashes.astype("<u8").tobytes()).hexdigest()
