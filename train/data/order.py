"""The order in which windows are seen: a pure function of (seed, position), so the loader's whole state is one integer.

Each epoch is one bijection of [0, windows): a balanced Feistel network over the smallest even number of bits that holds
them (Luby and Rackoff 1988), walked until it lands in range (Black and Rogaway 2002). Nothing is materialised.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, assert_never

import numpy as np
from numpy.typing import NDArray

from shards.errors import ConfigError

OrderName = Literal["shuffled", "sequential"]
ORDER_VERSION = 1  # part of a run's identity: another order would repeat some windows after a resume and lose others
ROUNDS = 6
CHUNK = 16384  # indices at a time: numpy's overhead makes 32 cost as much as 1,000, and walks end with a few
MAX_PERIOD = 2**20  # of an interleave, which is held in memory

_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # splitmix64's (Steele et al. 2014)
_S1, _S2 = np.uint64(30), np.uint64(27)


class Permutation:
    """A seeded bijection of [0, n) for one epoch."""

    def __init__(self, n: int, seed: int, epoch: int) -> None:
        if n < 1:
            raise ValueError(f"a permutation of {n} windows")
        self.n = n
        half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
        self._half, self._mask = np.uint64(half), np.uint64((1 << half) - 1)
        philox = np.random.Philox(key=np.array([seed, epoch], np.uint64))
        self._keys = philox.random_raw(ROUNDS)

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The windows at `positions`, an array of any length. IndexError outside [0, n): its walk would never end."""
        if len(positions) and (positions.min() < 0 or positions.max() >= self.n):
            raise IndexError(f"positions {positions.min()} to {positions.max()} of a permutation of {self.n}")
        out = self._feistel(positions.astype(np.uint64))
        while len(stray := np.flatnonzero(out >= self.n)):
            out[stray] = self._feistel(out[stray])
        return out.astype(np.int64)

    def _feistel(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = x >> self._half, x & self._mask
        for key in self._keys:
            mixed = right + key
            mixed = (mixed ^ (mixed >> _S1)) * _M1
            mixed = (mixed ^ (mixed >> _S2)) * _M2
            left, right = right, left ^ ((mixed >> np.uint64(31) ^ mixed) & self._mask)
        return left << self._half | right


class WindowOrder:
    """Which window comes k-th, for every k >= 0: each epoch, `k // windows`, holds each window once.

    `shuffled` is another permutation in each epoch, `sequential` the order of the stream in all of them.
    """

    def __init__(self, windows: int, seed: int, name: OrderName = "shuffled") -> None:
        self.windows, self.seed, self.name = windows, seed, name
        self._chunks: dict[tuple[int, int], NDArray[np.int64]] = {}

    def at(self, start: int, count: int) -> NDArray[np.int64]:
        """The windows at positions `start` to `start + count`: (count,) int64, to read only."""
        if start < 0:
            raise IndexError(f"position {start} of the order")
        pieces: list[NDArray[np.int64]] = []
        found = 0
        while not pieces or found < count:
            epoch, k = divmod(start + found, self.windows)
            pieces.append(self._load(epoch, k // CHUNK)[k % CHUNK :][: count - found])
            found += len(pieces[-1])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _load(self, epoch: int, number: int) -> NDArray[np.int64]:
        found = self._chunks.get((epoch, number))
        if found is None:
            found = np.arange(number * CHUNK, min((number + 1) * CHUNK, self.windows))
            match self.name:
                case "shuffled":
                    found = Permutation(self.windows, self.seed, epoch)(found)
                case "sequential":
                    pass
                case _:
                    assert_never(self.name)
            found.flags.writeable = False
            newest = list(self._chunks.items())[-1:]  # two are kept: reading ahead looks into the one that comes next
            self._chunks = dict([*newest, ((epoch, number), found)])
        return found


class Interleave:
    """Which of several folders each position takes from: exact shares in every `period` positions, and even within.

    Weights are any numbers, read as the decimals they are written as. A folder that takes w of a period's windows would
    ideally take its j-th after (j + 1/2) / w of it; all of them sorted by that are the pattern (Webster's method), and
    no folder is ever further than half the number of folders, and one half, from its share.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if not weights or not all(math.isfinite(weight) and weight > 0 for weight in weights):
            raise ConfigError(
                f"the weights of a mixture are {list(weights)}", "each is a number above 0", "change them"
            )
        exact = [Fraction(str(weight)) for weight in weights]
        whole = [weight * math.lcm(*(weight.denominator for weight in exact)) for weight in exact]
        self.shares = [int(weight / math.gcd(*map(int, whole))) for weight in whole]
        self.period = sum(self.shares)
        if self.period > MAX_PERIOD:
            raise ConfigError(
                f"the weights of a mixture are {list(weights)}, exact only over every {self.period:,} windows",
                f"at most {MAX_PERIOD:,} are allowed",
                "choose rounder numbers, such as 7, 2 and 1",
            )
        ideal = np.concatenate([(2 * np.arange(share) + 1) / share for share in self.shares])
        folders = np.repeat(np.arange(len(self.shares)), self.shares)
        self._pattern = folders[np.argsort(ideal, kind="stable")]
        self._taken = [np.flatnonzero(self._pattern == folder) for folder in range(len(self.shares))]

    def at(self, start: int, count: int) -> NDArray[np.int64]:
        """The folders that positions `start` to `start + count` take from: (count,) int64."""
        if start < 0:
            raise IndexError(f"position {start} of the order")
        return self._pattern[(np.arange(count) + start % self.period) % self.period]

    def before(self, position: int) -> list[int]:
        """How many windows each folder has given before `position`."""
        rounds, rest = divmod(position, self.period)
        return [
            rounds * share + int(np.searchsorted(taken, rest))
            for share, taken in zip(self.shares, self._taken, strict=True)
        ]
