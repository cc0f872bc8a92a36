"""The windows of a token folder, or of several in a mixture, by position: what a loader reads from.

Window k is `seq_len + 1` tokens from k * seq_len on, so that each token is a target once. A mixture takes each folder's
windows in that folder's own order, each once before any comes again.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Protocol, Self

import msgspec
import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from shards.errors import ConfigError, CorruptError, RefusedError
from shards.manifest import Split, encode
from shards.reader import TokenFolder, Tokens, TokenStream
from train.data.order import ORDER_VERSION, Interleave, OrderName, WindowOrder


class LoaderState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that is needed to resume a loader: `position` counts windows delivered, the rest identifies the data."""

    position: int
    windows: int
    seq_len: int
    seed: int
    order: OrderName
    order_version: int
    fingerprint: str


class Windows(Protocol):
    """Windows by position, for ever. `count` is how many an epoch has, `dtype` that of one token.

    `documents_per_window` is how many documents begin in one, on average.
    """

    count: int
    documents_per_window: float
    seq_len: int
    dtype: np.dtype[np.unsignedinteger]

    def read(self, position: int, rows: Sequence[Tokens]) -> None:
        """Fill `rows`, each (seq_len + 1,) of `dtype`, with the windows from `position` on."""

    def will_need(self, position: int, count: int) -> None:
        """Have the disk begin to read the windows at `position` to `position + count`, and wait for nothing."""

    def boundaries(self, position: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where documents begin inside the windows from `position` on, which become `rows` of a batch.

        Places in the flattened (batch, seq_len) inputs, in no order; a document at a window's first token is left out.
        """

    def state(self, position: int) -> LoaderState:
        """What to save, to resume at `position`."""


def window_count(tokens: int, seq_len: int) -> int:
    """How many windows of `seq_len` targets a stream has; window k starts at k * seq_len and shares its last token."""
    return max(0, (tokens - 1) // seq_len)


def position_of(windows: Windows, state: LoaderState) -> int:
    """The position in `state`. RefusedError when it is not a state of these windows in this order."""
    expected = windows.state(state.position)
    differing = [name for name in state.__struct_fields__ if getattr(state, name) != getattr(expected, name)]
    if differing:
        details = ", ".join(f"{name} {getattr(state, name)}, here {getattr(expected, name)}" for name in differing)
        raise RefusedError(
            f"the loader's saved state is of other data: {details}",
            "resuming would repeat some windows and lose others",
            "resume with the same token folder and settings, or start over with --fresh",
        )
    return state.position


class FolderWindows:
    """The windows of one stream. RefusedError when it has not even one."""

    def __init__(
        self,
        stream: TokenStream,
        seq_len: int,
        seed: int,
        order: OrderName = "shuffled",
        *,
        fingerprint: str = "",
        tokenizer: str = "",
    ) -> None:
        self.count, self.seq_len, self.dtype = window_count(len(stream), seq_len), seq_len, stream.dtype
        if not self.count:
            raise RefusedError(
                f"the split has {len(stream):,} tokens, one window takes {seq_len + 1:,}",
                "",
                "prepare more text, or choose a smaller model.seq_len",
            )
        self.fingerprint, self.tokenizer = fingerprint, tokenizer
        self.documents_per_window = sum(shard.header.documents for shard in stream.shards) / self.count
        self._stream = stream
        self._order = WindowOrder(self.count, seed, order)
        self._views: list[Tokens] = []  # of each shard, the windows entirely inside it: one index finds a window
        first, start = [], 0
        for shard in stream.shards:
            tokens = shard.tokens
            window = -(-start // seq_len)
            inside = tokens[window * seq_len - start :]
            shape = window_count(len(inside), seq_len), seq_len + 1
            strides = seq_len * tokens.itemsize, tokens.itemsize
            self._views.append(as_strided(inside, shape, strides, writeable=False))
            first.append(window)
            start += len(tokens)
        self._first = np.array(first)

    @classmethod
    def of(cls, folder: TokenFolder, split: Split, seq_len: int, seed: int, order: OrderName = "shuffled") -> Self:
        """The windows of a token folder's split."""
        manifest = folder.manifest
        return cls(
            folder.stream(split),
            seq_len,
            seed,
            order,
            fingerprint=manifest.fingerprint,
            tokenizer=manifest.tokenizer.ranks_sha256,
        )

    def read(self, position: int, rows: Sequence[Tokens]) -> None:
        """Fill `rows` from `position` on. Copies are numpy's, which let other threads run while the disk is read."""
        windows = self._order.at(position, len(rows))
        shards = self._first.searchsorted(windows, "right") - 1
        places = windows - self._first[shards]
        for row, window, shard, place in zip(rows, windows.tolist(), shards.tolist(), places.tolist(), strict=True):
            views = self._views[shard]
            if place < len(views):
                row[...] = views[place]
            else:  # it ends in a later shard
                self._stream.read_into(window * self.seq_len, row)

    def will_need(self, position: int, count: int) -> None:
        """Have the disk begin to read the windows at `position` to `position + count`, and wait for nothing."""
        for window in self._order.at(position, count).tolist():
            self._stream.will_need(window * self.seq_len, self.seq_len + 1)

    def boundaries(self, position: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where documents begin inside the windows from `position` on: places in the flattened inputs."""
        starts, at = self._document_starts, self._order.at(position, len(rows)) * self.seq_len
        first, last = starts.searchsorted(at, "right"), starts.searchsorted(at + self.seq_len)
        counts = last - first
        found: NDArray[np.int64] = np.arange(counts.sum()) + np.repeat(first - counts.cumsum() + counts, counts)
        places: NDArray[np.int64] = starts[found] + np.repeat(rows * self.seq_len - at, counts)
        return places

    def state(self, position: int) -> LoaderState:
        """What to save, to resume at `position`."""
        return LoaderState(
            position=position,
            windows=self.count,
            seq_len=self.seq_len,
            seed=self._order.seed,
            order=self._order.name,
            order_version=ORDER_VERSION,
            fingerprint=self.fingerprint,
        )

    @cached_property
    def _document_starts(self) -> NDArray[np.int64]:
        """Where in the stream each document begins: 8 bytes a document, read when the first batch asks."""
        found, start = [], 0
        for shard in self._stream.shards:
            found.append(shard.documents["start"].astype(np.int64) + start)
            if np.any(np.diff(found[-1], prepend=start, append=start + len(shard.tokens)) < 0):
                raise CorruptError(
                    f"{shard.path}: its documents do not begin one after the other",
                    "the index beside it was damaged",
                    "copy the file again from where it came, or millpond tokenize CONFIG --force",
                )
            start += len(shard.tokens)
        return np.concatenate(found)


class Mixture:
    """Windows of several folders, `weights` saying how many of each: 7 and 3 is seven tenths of the one.

    Shares are exact over every `Interleave.period` windows. An epoch is the fewest such periods in which each folder is
    seen whole; smaller ones begin their own next epochs meanwhile. ConfigError for folders that do not fit together.
    """

    def __init__(self, folders: Sequence[FolderWindows], weights: Sequence[float]) -> None:
        if len(folders) != len(weights):
            raise ConfigError(f"{len(folders)} folders, {len(weights)} weights", "", "give each folder one weight")
        self._interleave = Interleave(weights)
        self._folders = tuple(folders)
        other, apart = "one id would mean different texts", "they are read as one stream"
        for what, why, values in (
            ("tokenizers (sha256 of their ranks)", other, [folder.tokenizer for folder in folders]),
            ("bytes a token", other, [folder.dtype.itemsize for folder in folders]),
            ("window lengths", apart, [folder.seq_len for folder in folders]),
            ("seeds", apart, [folder.state(0).seed for folder in folders]),
            ("orders", apart, [folder.state(0).order for folder in folders]),
        ):
            if len(set(values)) > 1:
                raise ConfigError(
                    f"the folders of a mixture have different {what}: {', '.join(map(str, values))}",
                    why,
                    "mix folders that were prepared with the same tokenizer, and read them in the same way",
                )
        shares, period = self._interleave.shares, self._interleave.period
        rounds = max(-(-folder.count // share) for folder, share in zip(folders, shares, strict=True))
        self.count, self.seq_len, self.dtype = rounds * period, folders[0].seq_len, folders[0].dtype
        each = zip(folders, shares, strict=True)
        self.documents_per_window = sum(folder.documents_per_window * share for folder, share in each) / period

    def read(self, position: int, rows: Sequence[Tokens]) -> None:
        """Fill `rows` from `position` on."""
        for folder, at, mine in self._parts(position, len(rows)):
            folder.read(at, [rows[i] for i in mine.tolist()])

    def will_need(self, position: int, count: int) -> None:
        """Have the disk begin to read the windows at `position` to `position + count`, and wait for nothing."""
        for folder, at, mine in self._parts(position, count):
            folder.will_need(at, len(mine))

    def boundaries(self, position: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where documents begin inside the windows from `position` on: places in the flattened inputs."""
        parts = self._parts(position, len(rows))
        return np.concatenate([folder.boundaries(at, rows[mine]) for folder, at, mine in parts])

    def state(self, position: int) -> LoaderState:
        """What to save, to resume at `position`: the fingerprint is that of all folders and their shares."""
        states = [
            encode(folder.state(share)) for folder, share in zip(self._folders, self._interleave.shares, strict=True)
        ]
        return msgspec.structs.replace(
            self._folders[0].state(position),
            windows=self.count,
            fingerprint=hashlib.sha256(b"".join(states)).hexdigest(),
        )

    def _parts(self, position: int, count: int) -> list[tuple[FolderWindows, int, NDArray[np.int64]]]:
        """Each folder that has a part in these positions, where in its own order that begins, and which rows it is."""
        picks, before = self._interleave.at(position, count), self._interleave.before(position)
        rows = [np.flatnonzero(picks == i) for i in range(len(self._folders))]
        return [part for part in zip(self._folders, before, rows, strict=True) if len(part[2])]
