"""One part becomes its two shards, in the process that encodes it: no token ever travels between processes."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from prepare.parts import Part
from prepare.text.documents import read_pieces
from prepare.text.filters import HashFilter, contains, digest_of, forbidden_hashes, parse_filters
from prepare.tokens.encode import Encoded, Encoder, EngineName
from shards.atomic import AtomicFile, publish_bytes
from shards.errors import CorruptError
from shards.header import Placement, token_bytes
from shards.interop import SUFFIXES as TOKEN_SUFFIXES
from shards.interop import ForeignTokens, hash_documents, read_tokens
from shards.manifest import Counts, Manifest, PartRecord, encode
from shards.split import is_val
from shards.tokenizer import Tokenizer
from shards.writer import ShardWriter, sidecar_of

Advance = Callable[[int], None]
Hashes = NDArray[np.uint64]
BLOCK_DOCUMENTS = 1000  # of ready tokens, copied at a time


class FolderSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What every part of a token folder has in common.

    `manifest` is the one to publish, its parts those published so far. `forbid`: token folders whose validation
    documents stay out.
    """

    folder: Path
    manifest: Manifest
    engine: EngineName
    forbid: tuple[Path, ...] = ()


class _Piece(NamedTuple):
    """Whole documents: (tokens,) ids, (documents,) starts in them and hashes, and what became of the rows read."""

    tokens: NDArray[np.unsignedinteger]
    starts: NDArray[np.int64]
    hashes: Hashes
    counts: Counts


class Builder:
    """One process's encoder, and the making of one part after another with it. `advance` is told of tokens written."""

    def __init__(self, spec: FolderSpec, advance: Advance) -> None:
        self.spec, self._advance = spec, advance
        manifest, record = spec.manifest, spec.manifest.tokenizer
        self._tokenizer = Tokenizer.load(spec.folder / "tokenizer.tiktoken", record.name, record.ranks_sha256)
        self._encoder: Encoder | None = None  # costs a fraction of a second, and ready tokens need none
        self._dtype = np.dtype(f"<u{token_bytes(record.vocab_size)}")
        self._filters = parse_filters(manifest.filters)
        self._forbidden = forbidden_hashes(spec.forbid)
        if spec.forbid and digest_of(self._forbidden) != manifest.forbidden:
            raise CorruptError(
                f"tokens.forbid: the validation of {', '.join(path.name for path in spec.forbid)} changed meanwhile",
                "the folder would not be what its fingerprint says",
                "run the same command again",
            )

    def build(self, part: Part) -> PartRecord:
        """Write and seal the shards of `part`."""
        manifest = self.spec.manifest
        counts = Counts()
        with ExitStack() as stack:
            train, val = (
                stack.enter_context(
                    ShardWriter(
                        path,
                        vocab_size=self._tokenizer.vocab_size,
                        eot=self._tokenizer.eot,
                        placement=manifest.placement,
                        fingerprint=manifest.fingerprint,
                    )
                )
                for path in shard_paths(self.spec.folder, part.index)
            )
            for tokens, starts, hashes, found in self._pieces(part):
                counts = counts.plus(found)
                ends = np.append(starts[1:], len(tokens))
                in_val = is_val(hashes, manifest.val_fraction, part.split)
                for first, last in _runs(in_val):
                    a, b = starts[first], ends[last - 1]
                    shard = val if in_val[first] else train
                    shard.append(tokens[a:b], starts[first:last] - a, hashes[first:last])
                self._advance(len(tokens))
            record = PartRecord(
                source=part.source,
                last_source=part.last_source,
                first=part.first,
                last=part.last,
                ends_source=part.ends_source,
                counts=counts,
                train=train.seal(),
                val=val.seal(),
            )
        publish_bytes(receipt_path(self.spec.folder, part.index), encode(record))
        return record

    def write_hashes(self, part: Part) -> None:
        """The first of the two passes of dedup: the hashes of the part's documents, sorted, for those after it."""
        path = _hashes_path(self.spec.folder, part.index)
        if path.exists():
            return
        hashes = np.unique(np.concatenate([np.empty(0, np.uint64), *self._hashes(part)]))
        with AtomicFile(path) as out:
            np.lib.format.write_array(out, hashes, allow_pickle=False)
            out.publish()

    def _hashes(self, part: Part) -> Iterator[Hashes]:
        if part.path.name.endswith(TOKEN_SUFFIXES):
            yield hash_documents(self._ready(part), self._tokenizer)
            return
        column = self.spec.manifest.corpus.text_column
        for batch in read_pieces(part.pieces, column, self._filters):
            yield batch.hashes

    def _hash_filter(self, part: Part) -> HashFilter | None:
        dedup = self.spec.manifest.dedup
        if not dedup and not len(self._forbidden):
            return None
        return HashFilter(self._forbidden, self._came_before(part) if dedup else np.empty(0, np.uint64), dedup=dedup)

    def _came_before(self, part: Part) -> Hashes:
        """Those of the part's hashes that a part before it has, sorted. Memory holds two parts' hashes at a time."""
        folder = self.spec.folder
        own: Hashes = np.load(_hashes_path(folder, part.index), allow_pickle=False)
        found = np.zeros(len(own), np.bool_)
        for index in range(part.index):
            path = _hashes_path(folder, index)
            if path.exists():
                earlier = np.load(path, allow_pickle=False)
            else:  # published before: what its sidecars hold, with all that is before it, is the same set
                sidecars = [path for path in map(sidecar_of, shard_paths(folder, index)) if path.exists()]
                hashes = [np.load(path, allow_pickle=False)["hash"] for path in sidecars]
                earlier = np.sort(np.concatenate([np.empty(0, np.uint64), *hashes]))
            found |= contains(earlier, own)
        return own[found]

    def _pieces(self, part: Part) -> Iterator[_Piece]:
        return self._ready_tokens(part) if part.path.name.endswith(TOKEN_SUFFIXES) else self._encoded(part)

    def _encoded(self, part: Part) -> Iterator[_Piece]:
        manifest = self.spec.manifest
        self._encoder = self._encoder or Encoder(self._tokenizer, self.spec.folder, self.spec.engine)
        place = f"{part.path}, part {part.index}"
        column = manifest.corpus.text_column
        for batch in read_pieces(part.pieces, column, self._filters, self._hash_filter(part)):
            encoded = self._encoder.encode(batch.texts, batch.hashes, place)
            tokens, starts = lay_out(encoded, self._tokenizer.eot, manifest.placement or "before", self._dtype)
            yield _Piece(tokens, starts, batch.hashes, batch.counts)

    def _ready_tokens(self, part: Part) -> Iterator[_Piece]:
        found = self._ready(part)
        hashes, ends = hash_documents(found, self._tokenizer), np.append(found.starts[1:], len(found.tokens))
        hash_filter = self._hash_filter(part)
        for first in range(0, len(hashes), BLOCK_DOCUMENTS):
            block = slice(first, first + BLOCK_DOCUMENTS)
            drops = hash_filter(hashes[block]) if hash_filter else []
            out = np.logical_or.reduce([np.zeros(len(hashes[block]), np.bool_), *(mask for _, mask in drops)])
            runs = [slice(first + a, first + b) for a, b in _runs(out) if not out[a]]
            kept = [found.tokens[found.starts[run][0] : ends[run][-1]].astype(self._dtype, copy=False) for run in runs]
            ids = kept[0] if len(kept) == 1 else np.concatenate([np.empty(0, self._dtype), *kept])
            lengths = np.concatenate([np.empty(0, np.int64), *(ends[run] - found.starts[run] for run in runs)])
            counts = Counts(
                rows=len(out),
                dropped={reason: int(np.count_nonzero(mask)) for reason, mask in drops if mask.any()},
                text_bytes=int(self._tokenizer.byte_lengths[ids].sum()),
            )
            yield _Piece(ids, np.cumsum(lengths) - lengths, hashes[block][~out], counts)

    def _ready(self, part: Part) -> ForeignTokens:
        """The documents that begin in the part's range of the file."""
        found = read_tokens(part.path, eot=self._tokenizer.eot, vocab_size=self._tokenizer.vocab_size)
        first, last = np.searchsorted(found.starts, (part.first, part.last))
        ends = np.append(found.starts[1:], len(found.tokens))[first:last]
        start, end = (found.starts[first], ends[-1]) if len(ends) else (0, 0)
        return ForeignTokens(found.tokens[start:end], found.starts[first:last] - start, found.placement)


def lay_out(
    encoded: Encoded, eot: int, placement: Placement, dtype: np.dtype[np.unsignedinteger]
) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int64]]:
    """The documents end to end, an end-of-text `before` or `after` each: (tokens,), and (documents,) starts."""
    ids, offsets = encoded
    if len(ids) and int(ids.max()) >= eot:
        raise CorruptError(f"the engine gave token id {ids.max()}, the vocabulary's text ids end at {eot - 1}")
    count = len(offsets) - 1
    starts = offsets[:-1] + np.arange(count)
    marks = starts if placement == "before" else offsets[1:] + np.arange(count)
    tokens = np.empty(len(ids) + count, dtype)
    text = np.ones(len(tokens), np.bool_)
    text[marks] = False
    tokens[marks] = eot
    tokens[text] = ids
    return tokens, starts


def shard_paths(folder: Path, index: int) -> tuple[Path, Path]:
    """Where part number `index` has its train and its val shard."""
    return folder / f"train-{index:05}.bin", folder / f"val-{index:05}.bin"


def receipt_path(folder: Path, index: int) -> Path:
    """Where the record of a part is, from its sealing until the manifest holds it."""
    return folder / ".parts" / f"{index:05}.json"


def _hashes_path(folder: Path, index: int) -> Path:
    return folder / ".parts" / f"{index:05}.hashes.npy"


def _runs(flags: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """The (first, last) of each stretch of equal flags."""
    edges = [0, *(np.flatnonzero(flags[1:] != flags[:-1]) + 1).tolist(), len(flags)]
    return pairwise(edges) if len(flags) else iter(())
