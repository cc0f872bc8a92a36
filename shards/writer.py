"""One shard and its sidecar, streamed to disk: memory holds the document index, never the tokens."""

import hashlib
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from shards.atomic import AtomicFile
from shards.errors import CorruptError, RefusedError
from shards.header import HEADER_BYTES, MAX_FILE_BYTES, Placement, ShardHeader, token_bytes
from shards.manifest import ShardRecord

DOCS_DTYPE = np.dtype([("start", "<u8"), ("hash", "<u8")])


class ShardWriter:
    """Writes `path` and its `.docs.npy`; neither appears before `seal()`.

    with ShardWriter(path, vocab_size=50257, eot=50256, placement="before", fingerprint="3f…") as shard:
        shard.append(tokens, starts, hashes)
        record = shard.seal()
    """

    def __init__(self, path: Path, *, vocab_size: int, eot: int, placement: Placement | None, fingerprint: str) -> None:
        self.path = path
        self._blank = ShardHeader(
            tokens=0,
            token_bytes=token_bytes(vocab_size),
            vocab_size=vocab_size,
            eot=eot,
            placement=placement,
            fingerprint=fingerprint,
        )
        self.dtype = self._blank.dtype
        self._tokens = 0
        self._max_id = -1
        self._hash = xxhash.xxh3_64()
        self._docs: list[NDArray[np.void]] = []
        self._out = AtomicFile(path)
        self._out.write(self._blank.pack())

    def append(
        self, tokens: NDArray[np.unsignedinteger], starts: NDArray[np.int64], hashes: NDArray[np.uint64]
    ) -> None:
        """Append whole documents, end-of-text tokens included.

        `tokens`: 1-D, of the shard's own `dtype`. `starts`: where in `tokens` each document begins. `hashes`: xxh3-64
        of each document's UTF-8. CorruptError when an id is not in the vocabulary, RefusedError past 2^31-1 bytes.
        """
        if len(tokens) == 0:
            return
        largest = int(tokens.max())
        if largest >= self._blank.vocab_size:
            raise CorruptError(
                f"{self.path}: token id {largest}, the vocabulary has {self._blank.vocab_size}",
                "the tokenizer and the shard do not belong together",
            )
        if HEADER_BYTES + (self._tokens + len(tokens)) * self.dtype.itemsize > MAX_FILE_BYTES:
            raise RefusedError(
                f"{self.path}: the shard would be larger than {MAX_FILE_BYTES:,} bytes",
                "one part becomes one shard, and this part's source cannot be cut",
                "split the source file, or store it as parquet or uncompressed jsonl",
            )
        docs = np.empty(len(starts), DOCS_DTYPE)
        docs["start"] = starts + self._tokens
        docs["hash"] = hashes
        self._docs.append(docs)
        data = np.ascontiguousarray(tokens, self.dtype).data
        self._hash.update(data)
        self._out.write(data)
        self._tokens += len(tokens)
        self._max_id = max(self._max_id, largest)

    def seal(self) -> ShardRecord:
        """Publish the sidecar, then the shard; neither without a token."""
        if not self._tokens:
            nothing = hashlib.sha256().hexdigest()
            return ShardRecord(
                file=self.path.name,
                tokens=0,
                documents=0,
                nbytes=0,
                max_id=-1,
                sha256=nothing,
                xxh3=self._hash.hexdigest(),
                docs_sha256=nothing,
            )
        docs = np.concatenate(self._docs)
        header = ShardHeader(
            tokens=self._tokens,
            token_bytes=self._blank.token_bytes,
            documents=len(docs),
            vocab_size=self._blank.vocab_size,
            eot=self._blank.eot,
            placement=self._blank.placement,
            max_id=self._max_id,
            xxh3=self._hash.intdigest(),
            fingerprint=self._blank.fingerprint,
        )
        with AtomicFile(sidecar_of(self.path)) as sidecar:
            np.lib.format.write_array(sidecar, docs, allow_pickle=False)
            docs_sha256 = sidecar.digest()
            sidecar.publish()
        self._out.write(header.pack(), at=0)
        sha256 = self._out.digest()
        self._out.publish()
        return ShardRecord(
            file=self.path.name,
            tokens=header.tokens,
            documents=header.documents,
            nbytes=header.nbytes,
            max_id=header.max_id,
            sha256=sha256,
            xxh3=f"{header.xxh3:016x}",
            docs_sha256=docs_sha256,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._out.__exit__(kind, error, trace)


def sidecar_of(path: Path) -> Path:
    """Where the document starts and hashes of shard `path` are."""
    return path.with_name(path.name.removesuffix(".bin") + ".docs.npy")
