"""Reading shards through the page cache: opening costs milliseconds, whatever the size, and copies nothing."""

import mmap
import os
import re
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from shards.atomic import open_regular
from shards.errors import ConfigError, CorruptError, from_os_error
from shards.header import HEADER_BYTES, ShardHeader, token_bytes
from shards.manifest import Manifest, ShardRecord, Split
from shards.tokenizer import Tokenizer
from shards.writer import DOCS_DTYPE, sidecar_of

try:
    import resource
except ImportError:  # Windows, which has no such limit
    resource = None  # type: ignore[assignment]

Tokens = NDArray[np.unsignedinteger]
_NPY = re.compile(  # what numpy writes before DOCS_DTYPE: numpy.load would evaluate what it finds there, and unzip
    rb"\x93NUMPY\x01\x00(..)\{'descr': \[\('start', '<u8'\), \('hash', '<u8'\)\], "
    rb"'fortran_order': False, 'shape': \((\d{1,10}),\), \} *\n",
    re.DOTALL,
)
_NPY_BYTES = 1024
_BLOCK_TOKENS = 1 << 18  # half a MB: hashed and searched for its maximum while it is in the cache
_AGAIN = "copy the file again from where it came, or millpond tokenize CONFIG --force"


def allow_open_files(count: int) -> None:
    """Raise this process's soft limit where `count` more files would not fit: a map keeps its file open."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256
    if soft != resource.RLIM_INFINITY and soft < wanted and (hard == resource.RLIM_INFINITY or hard > soft):
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class Shard:
    """One memory-mapped shard: `header`, and `tokens`, a read-only (tokens,) array of uint16 or uint32.

    Opens llm.c's files as well. CorruptError when the size is not what the header says.
    """

    def __init__(self, path: Path, *, follow_links: bool = True) -> None:
        self.path = path
        self._follow_links = follow_links
        with open_regular(path, follow_links=follow_links) as file:
            size = os.fstat(file.fileno()).st_size
            try:
                head = file.read(HEADER_BYTES)
            except OSError as error:
                raise from_os_error(error, path, "read") from error
            self.header = ShardHeader.unpack(head, str(path))
            if size != self.header.nbytes:
                raise CorruptError(
                    f"{path}: {size:,} bytes, its header says {self.header.nbytes:,} ({self.header.tokens:,} tokens)",
                    "the file was cut short or something was appended",
                    _AGAIN,
                )
            self._map = _map(file, path)
            if hasattr(self._map, "madvise"):  # readahead around random windows reads 350 times what is used
                self._map.madvise(mmap.MADV_RANDOM)
            self.tokens: Tokens = _array(self._map, self.header.dtype, self.header.tokens, HEADER_BYTES)

    @cached_property
    def documents(self) -> NDArray[np.void]:
        """The sidecar: a (documents,) array of `start` (u8, a token offset) and `hash` (u8, xxh3-64 of the text)."""
        path = sidecar_of(self.path)
        with open_regular(path, follow_links=self._follow_links) as file:
            size = os.fstat(file.fileno()).st_size
            try:
                head = file.read(_NPY_BYTES)
            except OSError as error:
                raise from_os_error(error, path, "read") from error
            found = _NPY.match(head)
            if not found or found.end() != 10 + int.from_bytes(found[1], "little"):
                raise CorruptError(f"{path}: not a document index: no .npy header of {DOCS_DTYPE}", "", _AGAIN)
            documents = int(found[2])
            if documents != self.header.documents:
                raise CorruptError(f"{path}: {documents:,} documents, expected {self.header.documents:,}", "", _AGAIN)
            if size != found.end() + documents * DOCS_DTYPE.itemsize:
                raise CorruptError(f"{path}: {size:,} bytes cannot be {documents:,} documents", "", _AGAIN)
            return _array(_map(file, path), DOCS_DTYPE, documents, found.end())

    def document(self, i: int) -> Tokens:
        """The tokens of document `i`, its end-of-text included."""
        if not 0 <= i < self.header.documents:
            raise IndexError(f"document {i}: {self.path} has {self.header.documents}")
        last = i + 1 == self.header.documents
        stop = self.header.tokens if last else int(self.documents["start"][i + 1])
        return self.tokens[int(self.documents["start"][i]) : stop]

    def will_need(self, start: int, n: int) -> None:
        """Have the disk begin to read tokens `start` to `start + n`, and wait for nothing: a hint."""
        if n and hasattr(self._map, "madvise"):
            first = HEADER_BYTES + start * self.tokens.itemsize
            page = first - first % mmap.PAGESIZE  # EINVAL for an address inside a page
            self._map.madvise(mmap.MADV_WILLNEED, page, first + n * self.tokens.itemsize - page)

    def check_tokens(self) -> None:
        """Read every token; CorruptError when they are not what was written, or one is not in the vocabulary.

        A hash can be made to agree, and a GPU reads past its table for an id it does not have.
        """
        digest, size, stray = xxhash.xxh3_64(), self.header.vocab_size or 2**32, None
        for at in range(0, len(self.tokens), _BLOCK_TOKENS):
            block = self.tokens[at : at + _BLOCK_TOKENS]
            digest.update(block.data)
            if stray is None and block.max() >= size:
                stray = at + int((block >= size).argmax())
        found = digest.intdigest()
        if found != self.header.xxh3:
            raise CorruptError(
                f"{self.path}: xxh3 of the tokens is {found:016x}, its header says {self.header.xxh3:016x}",
                "at least one token differs from what was written: the disk or a copy damaged it",
                _AGAIN,
            )
        if stray is not None:
            raise CorruptError(
                f"{self.path}: offset {HEADER_BYTES + stray * self.tokens.itemsize:,}: token {stray:,} is id "
                f"{self.tokens[stray]}, expected one below {size}, the size of the vocabulary",
                "the model has no row for it; its hashes agree, so it was written so",
                _AGAIN,
            )


def _map(file: BufferedReader, path: Path) -> mmap.mmap:
    try:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise from_os_error(error, path, "mapped") from error


def _array(view: mmap.mmap, dtype: np.dtype[Any], count: int, offset: int) -> NDArray[Any]:
    """`count` items from `offset` on, read-only, through the page cache."""
    return np.frombuffer(view, dtype, count, offset) if count else np.empty(0, dtype)


class TokenStream:
    """The shards of one split as one long array of tokens that is never assembled."""

    def __init__(self, shards: Sequence[Shard], dtype: np.dtype[Any]) -> None:
        self.dtype, self.shards = dtype, tuple(shards)
        self._arrays = [shard.tokens for shard in shards] or [np.empty(0, dtype)]
        self._starts = [0, *np.cumsum([len(array) for array in self._arrays], dtype=int).tolist()]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def window(self, start: int, n: int) -> Tokens:
        """Tokens `start` to `start + n`: a view when they are in one shard, else one copy of just them."""
        i = self._locate(start, n)
        at = start - self._starts[i]
        if at + n <= len(self._arrays[i]):
            return self._arrays[i][at : at + n]
        out = np.empty(n, self.dtype)
        self.read_into(start, out)
        return out

    def read_into(self, start: int, out: Tokens) -> None:
        """Fill `out`, 1-D and of the stream's dtype, with the tokens from `start` on."""
        i, filled = self._locate(start, len(out)), 0
        while filled < len(out):
            at = start + filled - self._starts[i]
            piece = self._arrays[i][at : at + len(out) - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            i += 1

    def will_need(self, start: int, n: int) -> None:
        """Have the disk begin to read tokens `start` to `start + n`, and wait for nothing."""
        i, announced = self._locate(start, n), 0
        while announced < n:
            at = start + announced - self._starts[i]
            piece = min(n - announced, len(self._arrays[i]) - at)
            self.shards[i].will_need(at, piece)
            announced += piece
            i += 1

    def _locate(self, start: int, n: int) -> int:
        if start < 0 or n < 0 or start + n > len(self):
            raise IndexError(f"tokens {start} to {start + n}: the stream has {len(self)}")
        return min(bisect_right(self._starts, start) - 1, max(len(self._arrays) - 1, 0))


class TokenFolder:
    """A token folder: its manifest, its tokenizer, and a stream for each split.

    `verify`: "size" compares every header and size with the manifest, "hash" also reads all tokens and proves that each
    is in the vocabulary. `parts` opens only the first so many parts, so that growth does not disturb a run that started
    before it.
    """

    def __init__(self, path: Path, verify: Literal["size", "hash"] = "size", parts: int | None = None) -> None:
        self.path = path
        self.manifest = Manifest.read(path)
        available = len(self.manifest.parts)
        if parts is not None and parts > available:
            raise ConfigError(
                f"{path}: {parts} parts were pinned, the folder has {available}",
                "the run started with more tokens than are here now",
                "millpond prepare CONFIG, with the max_tokens that the run was started with",
            )
        self.parts = available if parts is None else parts
        allow_open_files(4 * self.parts)  # two shards a part, and their sidecars
        opened = msgspec.structs.replace(self.manifest, parts=self.manifest.parts[: self.parts])
        self._shards: dict[Split, list[Shard]] = {
            "train": [self._open(record) for record in opened.shards("train")],
            "val": [self._open(record) for record in opened.shards("val")],
        }
        if verify == "hash":
            with ThreadPoolExecutor(4) as pool:  # hashing and page faults both release the GIL
                for _ in pool.map(Shard.check_tokens, (*self._shards["train"], *self._shards["val"])):
                    pass

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the folder."""
        return Tokenizer.of_folder(self.path, self.manifest.tokenizer)

    def shards(self, split: Split) -> list[Shard]:
        """The split's open shards, in order."""
        return self._shards[split]

    def stream(self, split: Split) -> TokenStream:
        """All tokens of a split, end-of-text tokens included."""
        dtype = np.dtype(f"<u{token_bytes(self.manifest.tokenizer.vocab_size)}")
        return TokenStream(self._shards[split], dtype)

    def _open(self, record: ShardRecord) -> Shard:
        shard = Shard(self.path / record.file, follow_links=False)
        header, tokenizer = shard.header, self.manifest.tokenizer
        for what, got, expected in (
            ("vocabulary", header.vocab_size, tokenizer.vocab_size),
            ("end-of-text id", header.eot, tokenizer.eot),
            ("end-of-text placement", header.placement, self.manifest.placement),
            ("fingerprint", header.fingerprint, self.manifest.fingerprint),
            ("tokens", header.tokens, record.tokens),
            ("documents", header.documents, record.documents),
            ("largest id", header.max_id, record.max_id),
            ("xxh3", f"{header.xxh3:016x}", record.xxh3),
        ):
            if got != expected:
                raise CorruptError(
                    f"{shard.path}: {what} is {got}, the manifest says {expected}",
                    "the shard belongs to another token folder or another tokenizer",
                    _AGAIN,
                )
        return shard
