"""Token files of others: llm.c's, nanoGPT's, numpy's and Megatron's are read; the last three are also written.

A file may come from a stranger: every id is compared with the vocabulary before it is handed on, and nothing larger
than the index of documents is ever allocated.
"""

import re
import stat
import struct
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, assert_never

import numpy as np
import xxhash
from numpy.typing import NDArray

from shards.atomic import AtomicFile, make_folder, open_regular
from shards.errors import ConfigError, CorruptError, RefusedError, from_os_error
from shards.header import HEADER_BYTES, MAGICS, Placement, ShardHeader
from shards.header import token_bytes as width_of
from shards.manifest import Split
from shards.reader import Shard, TokenFolder
from shards.sniff import HEAD_BYTES, nature_of
from shards.tokenizer import Tokenizer

Format = Literal["nanogpt", "npy", "megatron"]
FORMATS: tuple[Format, ...] = ("nanogpt", "npy", "megatron")
SUFFIXES = (".bin", ".npy")

_WRITTEN: dict[Format, tuple[str, ...]] = {"nanogpt": (".bin",), "npy": (".npy",), "megatron": (".bin", ".idx")}
_NUMPY = b"\x93NUMPY"
_INDEX = struct.Struct("<9sQBQQ")  # Megatron: magic, version, type of a token, sequences, document bounds
_MEGATRON = b"MMIDIDX\0\0"
_CODES = {3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # Megatron's numbers for the types that can hold ids
_BLOCK = 1 << 18  # tokens; as bytes objects with their text a few MB, whatever the file
_LIKE_TOKENS = ("numpy", "utf-16", "utf-32")  # the last two are how small ids look
_AGAIN = "copy the file again from where it came"


class ForeignTokens(NamedTuple):
    """`tokens`: (tokens,) uint16 or uint32, read-only, memory-mapped, perhaps strided; every id is in the vocabulary.

    `starts`: (documents,) int64, where in `tokens` each document begins, the first at 0, strictly increasing. Its
    end-of-text belongs to a document. `placement` says on which side of a document it is in this file.
    """

    tokens: NDArray[np.unsignedinteger]
    starts: NDArray[np.int64]
    placement: Placement


def read_tokens(path: Path, *, eot: int, vocab_size: int) -> ForeignTokens:
    """Open a token file of any known form and check every id in it.

    The content says which form: Megatron's (an .idx beside it), numpy's and llm.c's (each begins with its magic;
    our own shards are llm.c's), else nanoGPT's headerless ids, uint16, or uint32 when `vocab_size` > 65,536.

    Megatron's index says where documents begin. In the other forms the end-of-text ids do: before its document when the
    file begins with one, after it when the file ends with one, and before when neither; what then precedes the first is
    a document without. Each end-of-text bounds one document, so of several in a row each is a document with no text:
    joined to a neighbour, it would be an end-of-text inside a document, which no reader of shards expects.

    CorruptError when the file is not what it says or an id is not in the vocabulary, ConfigError when it is missing.
    """
    head = _head(path, HEAD_BYTES)
    found = nature_of(head)
    if found is not None and found.name not in _LIKE_TOKENS:
        raise CorruptError(f"{path}: is {found.what}, not tokens", "training would use it as text", found.fix)
    index = path.with_suffix(".idx") if path.suffix == ".bin" else None
    starts: NDArray[np.int64] | None = None
    placement: Placement | None = None
    if index is not None and index.exists():
        raw, starts = _read_megatron(path, index)
    elif head.startswith(_NUMPY):
        raw = _read_npy(path)
    elif head[:4] in MAGICS:
        raw, placement = _read_shard(path, eot=eot, vocab_size=vocab_size)
    else:
        raw = _read_headerless(path, vocab_size)
    marks = _check_ids(path, raw, eot=eot, vocab_size=vocab_size)
    if placement is None:
        ends_only = len(raw) > 0 and raw[0] != eot and raw[-1] == eot
        placement = "after" if ends_only else "before"
    if starts is None:
        starts = marks + 1 if placement == "after" else marks
        starts = np.union1d(np.zeros(1, np.int64), starts)
        starts = starts[starts < len(raw)]
    if raw.dtype.itemsize == 8:  # the low halves, still in the map: every high half is 0, or the id would be too large
        return ForeignTokens(raw.view("<u4")[::2], starts, placement)
    return ForeignTokens(raw.view(f"<u{raw.dtype.itemsize}"), starts, placement)


def token_bytes(path: Path) -> int:
    """About how many bytes a token takes in a file, from its first bytes alone: for a plan."""
    with open_regular(path) as file:
        head = file.read(HEADER_BYTES)
    if head[:4] in MAGICS:
        return ShardHeader.unpack(head.ljust(HEADER_BYTES, b"\0"), str(path)).token_bytes
    dtype = re.search(rb"'descr': '[<|>=]?[iu]([248])'", head) if head.startswith(_NUMPY) else None
    return int(dtype[1]) if dtype else 2


def hash_documents(found: ForeignTokens, tokenizer: Tokenizer) -> NDArray[np.uint64]:
    """(documents,) the xxh3-64 of the bytes each document decodes to, end-of-text left out: for text that is valid
    UTF-8, the hash that preparing it would give.

    `found` was read with this tokenizer's `eot` and `vocab_size`. Holds at most 2^18 tokens' text at a time.
    """
    # Gathering pointers to bytes objects: 18, 32 and 38 Mtok/s with documents of 50, 200 and 1,000 tokens, against 10,
    # 18 and 19 by indexing a list. Gathering the bytes themselves from a flat table: 17, 24 and 25 (2 cores, Nov 2026).
    table = np.array([*tokenizer.tokens, b""], dtype=object)
    hashes = np.empty(len(found.starts), np.uint64)
    for i, (start, stop) in enumerate(pairwise(chain(map(int, found.starts), [len(found.tokens)]))):
        digest = xxhash.xxh3_64()
        for at in range(start, stop, _BLOCK):
            digest.update(b"".join(table.take(found.tokens[at : min(at + _BLOCK, stop)]).tolist()))
        hashes[i] = digest.intdigest()
    return hashes


def export(folder: TokenFolder, split: Split, form: Format, to: Path) -> list[Path]:
    """Write a split of a token folder as one file in the folder `to`; returns what was written.

    "nanogpt" is `train.bin`: the ids and nothing else. "npy" is `train.npy`: a 1-D array. "megatron" is `train.bin` and
    `train.idx`: each document a sequence. For "val" the names begin with it. Ids are uint16, or uint32 (Megatron:
    int32) with a vocabulary over 65,536. They come as they are in the shards, in order, with end-of-text where it is;
    llm.c needs no export, since it reads the shards themselves.

    Streams: memory holds Megatron's index of documents, never the tokens. CorruptError when tokens are not what was
    prepared, RefusedError when the split is empty (no reader maps an empty file) or a file is already there.
    """
    shards = folder.shards(split)
    tokens = sum(shard.header.tokens for shard in shards)
    if not tokens:
        raise RefusedError(
            f"{folder.path}: its {split} split has no tokens",
            "an empty file cannot be mapped, so no trainer could open it",
            "export the other split, or prepare with another tokens.val_fraction",
        )
    paths = [to / f"{split}{suffix}" for suffix in _WRITTEN[form]]
    for path in paths:
        if path.exists():
            raise RefusedError(
                f"{path}: is already there", "nothing is overwritten", "remove it, or name another folder"
            )
    make_folder(to)
    dtype = folder.stream(split).dtype
    with AtomicFile(paths[0]) as data:
        if form == "npy":
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (tokens,)}
            np.lib.format.write_array_header_1_0(data, header)
        for shard in shards:
            shard.check_tokens()
            data.write(shard.tokens.data)
        match form:
            case "megatron":
                with AtomicFile(paths[1]) as index:
                    for piece in _megatron_index(shards, dtype):
                        index.write(piece)
                    data.publish()
                    index.publish()
            case "nanogpt" | "npy":
                data.publish()
            case _:
                assert_never(form)
    return paths


def _head(path: Path, nbytes: int) -> bytes:
    """The first bytes of a file, as many as there are; a pipe is refused, since opening one waits for its writer."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ConfigError(f"{path}: is not a file", "", "name a file of tokens")
        with path.open("rb") as file:
            return file.read(nbytes)
    except OSError as error:
        raise from_os_error(error, path, "read") from error


def _map(path: Path, dtype: str, count: int, offset: int = 0) -> NDArray[Any]:
    """`count` items of a file whose size has been checked. An empty map does not exist, so none are an empty array."""
    if count == 0:
        return np.empty(0, dtype)
    try:
        return np.asarray(np.memmap(path, dtype, "r", offset, (count,)))
    except OSError as error:
        raise from_os_error(error, path, "mapped") from error


def _read_shard(path: Path, *, eot: int, vocab_size: int) -> tuple[NDArray[Any], Placement | None]:
    """The tokens of a shard; where our own have their end-of-text is in the header, llm.c's do not say."""
    shard = Shard(path)
    header = shard.header
    if header.native and (header.vocab_size, header.eot) != (vocab_size, eot):
        raise CorruptError(
            f"{path}: its header says vocabulary {header.vocab_size} and end-of-text {header.eot}, expected "
            f"{vocab_size} and {eot}",
            "with another tokenizer every token means something else",
        )
    return shard.tokens, header.placement


def _read_headerless(path: Path, vocab_size: int) -> NDArray[Any]:
    if path.suffix == ".npy":
        raise CorruptError(
            f"{path}: does not begin with numpy's magic",
            "it was damaged, or holds ids without a header, as OLMo's do",
            f"{_AGAIN}, or rename it to .bin if it holds nothing but ids",
        )
    width, nbytes = width_of(vocab_size), path.stat().st_size
    if nbytes == 0 or nbytes % width:
        raise CorruptError(
            f"{path}: {nbytes:,} bytes, which is not a whole number of {width}-byte ids",
            f"without a header it is read as nanoGPT's, and a vocabulary of {vocab_size:,} takes {width} bytes an id",
            _AGAIN,
        )
    tokens = _map(path, f"<u{width}", nbytes // width)
    if len(tokens) >= 2048 and not tokens[1:2048:2].any():  # every second id is "!" or the like in no text
        raise CorruptError(
            f"{path}: of its first 2,048 ids every second one is 0",
            f"it seems to hold {2 * width}-byte ids, and {width}-byte ones belong to a vocabulary of {vocab_size:,}",
            "convert it to .npy, which says how wide its ids are",
        )
    return tokens


def _read_npy(path: Path) -> NDArray[Any]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        nbytes = path.stat().st_size
    except OSError as error:
        raise from_os_error(error, path, "read") from error
    except Exception as error:  # numpy parses the header as Python: a stranger's can raise nearly anything
        raise CorruptError(f"{path}: not a numpy array: {error}", "", _AGAIN) from error
    if array.ndim != 1 or array.dtype.str not in ("<u2", "<u4", "<i4", "<i8"):
        raise CorruptError(
            f"{path}: an array of {array.dtype.str} with shape {array.shape}",
            "ids are one row of little-endian uint16, uint32, int32 or int64",
        )
    expected = array.offset + array.nbytes
    if nbytes != expected:
        raise CorruptError(f"{path}: {nbytes:,} bytes, its header says {expected:,}", "something was appended", _AGAIN)
    return np.asarray(array)


def _read_megatron(path: Path, index: Path) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """A pair of Megatron-LM's (megatron/core/datasets/indexed_dataset.py): tokens, and where documents begin in them.

    A document is one or more sequences, one behind the other; those without a token are dropped.
    """
    head = _head(index, _INDEX.size)
    if len(head) < _INDEX.size or not head.startswith(_MEGATRON):
        raise CorruptError(
            f"{index}: does not begin as a Megatron index does",
            f"an .idx beside a .bin says where the documents of {path.name} begin",
            f"{_AGAIN}, or move it away if it has nothing to do with {path.name}",
        )
    _, version, code, sequences, bounds = _INDEX.unpack(head)
    if version != 1 or code not in _CODES:
        raise CorruptError(
            f"{index}: version {version} with tokens of type {code}",
            f"ids are read from version 1 with types {', '.join(map(str, _CODES))} (int16, int32, int64, uint16)",
        )
    expected = _INDEX.size + 12 * sequences + 8 * bounds
    if index.stat().st_size != expected:
        raise CorruptError(
            f"{index}: {index.stat().st_size:,} bytes, its header says {expected:,} ({sequences:,} sequences)",
            "it was cut short, or it is multimodal, which text is not",
            _AGAIN,
        )
    dtype = _CODES[code]
    width, nbytes = np.dtype(dtype).itemsize, path.stat().st_size
    lengths = _map(index, "<i4", sequences, _INDEX.size)
    pointers = _map(index, "<i8", sequences, _INDEX.size + 4 * sequences)
    cuts = _map(index, "<i8", bounds, _INDEX.size + 12 * sequences)
    starts = np.zeros(sequences + 1, np.int64)
    np.cumsum(lengths, dtype=np.int64, out=starts[1:])
    if lengths.min(initial=0) < 0 or int(starts[-1]) * width != nbytes:
        raise CorruptError(
            f"{path}: {nbytes:,} bytes, the sequences in {index.name} have {int(starts[-1]) * width:,}",
            "the two files do not belong together, or one was cut short",
            _AGAIN,
        )
    astray = np.flatnonzero(pointers != starts[:-1] * width)
    if len(astray):
        at = int(astray[0])
        raise CorruptError(
            f"{index}: sequence {at:,} begins at byte {pointers[at]:,}, the one before ends at {starts[at] * width:,}",
            "only consecutive sequences, without gap or overlap, become a shard",
            "write the file again with Megatron's tools/merge_datasets.py",
        )
    if len(cuts) == 0 or cuts[0] != 0 or cuts[-1] != sequences or bool((cuts[1:] < cuts[:-1]).any()):
        raise CorruptError(
            f"{index}: its {bounds:,} document bounds do not run from sequence 0 to {sequences:,}", "", _AGAIN
        )
    edges = starts[cuts]
    return _map(path, dtype, int(starts[-1])), edges[:-1][edges[:-1] < edges[1:]]


def _check_ids(path: Path, raw: NDArray[Any], *, eot: int, vocab_size: int) -> NDArray[np.int64]:
    """Where the end-of-text ids are, from one pass over the file; CorruptError at the first id that cannot be."""
    unsigned = raw.view(f"<u{raw.dtype.itemsize}")  # a negative id becomes a huge one
    marks = [np.empty(0, np.int64)]
    for at in range(0, len(raw), _BLOCK):
        block = unsigned[at : at + _BLOCK]
        if int(block.max()) >= vocab_size:
            i = at + int(np.argmax(block >= vocab_size))
            raise CorruptError(
                f"{path}: token {i:,} is {raw[i]}, the vocabulary has {vocab_size:,} ids",
                "the file was written with another tokenizer, or does not hold tokens",
                "name the tokenizer that the file was written with",
            )
        marks.append(np.flatnonzero(block == eot) + at)
    return np.concatenate(marks)


def _megatron_index(shards: list[Shard], dtype: np.dtype[Any]) -> Iterator[memoryview | bytes]:
    """The bytes of an .idx: every document a sequence of its own."""
    lengths = np.concatenate([_lengths(shard) for shard in shards])
    edges = np.zeros(len(lengths) + 1, "<i8")
    np.cumsum(lengths, out=edges[1:])
    yield _INDEX.pack(_MEGATRON, 1, 8 if dtype.itemsize == 2 else 4, len(lengths), len(edges))
    yield lengths.data
    yield (edges[:-1] * dtype.itemsize).data
    yield np.arange(len(edges), dtype="<i8").data


def _lengths(shard: Shard) -> NDArray[np.int32]:
    """(documents,) the tokens of each document. CorruptError when the sidecar's documents do not cover the shard."""
    edges = np.append(shard.documents["start"], np.uint64(shard.header.tokens))
    if edges[0] != 0 or bool((edges[1:] <= edges[:-1]).any()):
        raise CorruptError(
            f"{shard.path}: the documents in its sidecar do not follow one another",
            "the file that says where documents begin is damaged",
            f"millpond verify {shard.path.parent}",
        )
    return np.diff(edges).astype("<i4")
