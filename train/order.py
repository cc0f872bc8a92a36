"""The order in which windows are seen: a pure function of (seed, position), so the loader's whole state is one integer.

Each epoch is one bijection of [0, windows): a balanced Feistel network over the smallest even number of bits that holds
them (Luby and Rackoff 1988), walked until it lands in range (Black and Rogaway 2002). Nothing is materialised.
"""

import numpy as np
from numpy.typing import NDArray

ORDER_VERSION = 1  # part of a run's identity: another order would repeat some windows after a resume and lose others
ROUNDS = 6
CHUNK = 4096  # indices at a time: numpy's overhead makes 32 of them cost as much as 1,000

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
    """Which window comes k-th, for every k >= 0: epoch `k // windows` is shuffled anew, each window once in each."""

    def __init__(self, windows: int, seed: int) -> None:
        self.windows, self.seed = windows, seed
        self._chunk: tuple[int, int, NDArray[np.int64]] = (-1, -1, np.empty(0, np.int64))

    def at(self, start: int, count: int) -> NDArray[np.int64]:
        """The windows at positions `start` to `start + count`: (count,) int64."""
        if start < 0:
            raise IndexError(f"position {start} of the order")
        out = np.empty(count, np.int64)
        filled = 0
        while filled < count:
            epoch, k = divmod(start + filled, self.windows)
            chunk = self._load(epoch, k // CHUNK)
            piece = chunk[k % CHUNK :][: count - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
        return out

    def _load(self, epoch: int, number: int) -> NDArray[np.int64]:
        if self._chunk[:2] != (epoch, number):
            positions = np.arange(number * CHUNK, min((number + 1) * CHUNK, self.windows))
            self._chunk = epoch, number, Permutation(self.windows, self.seed, epoch)(positions)
        return self._chunk[2]
