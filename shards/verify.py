"""Checking a token folder to the last byte: sizes, hashes, and whether the tokens are what the sidecar says."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shards.atomic import sha256_of
from shards.errors import CorruptError, MillpondError
from shards.manifest import Manifest, Split
from shards.reader import Shard, TokenFolder, Tokens
from shards.split import is_val

BLOCK_TOKENS = 1 << 22


class Finding(NamedTuple):
    """One thing that is wrong, and the file it was found in."""

    file: str
    what: str


def verify(path: Path, *, full: bool = True) -> list[Finding]:
    """Everything wrong with the token folder `path`; nothing when it is valid.

    Sizes and headers always; with `full` also every sha256, the token hash and the documents' boundaries. One run shows
    all findings. Raises only when the manifest itself cannot be read.
    """
    manifest = Manifest.read(path)
    findings: list[Finding] = []
    if full:
        for name, sha256 in manifest.files():
            try:
                found = sha256_of(path / name)
            except MillpondError as error:
                findings.append(Finding(name, error.what))
                continue
            if found != sha256:
                findings.append(Finding(name, f"sha256 is {found}, the manifest says {sha256}"))
    try:
        folder = TokenFolder(path)
    except MillpondError as error:
        return findings or [Finding(path.name, error.what)]
    if full and not findings:
        splits: tuple[Split, ...] = ("train", "val")
        for split in splits:
            parts = [part for part in manifest.parts if (part.train if split == "train" else part.val).nbytes]
            for part, shard in zip(parts, folder.shards(split), strict=True):
                findings += [Finding(shard.path.name, what) for what in _inside(shard)]
                given = manifest.sources[part.source].split
                in_val = is_val(shard.documents["hash"], manifest.val_fraction, given)
                if strays := np.count_nonzero(in_val != (split == "val")):
                    findings.append(Finding(shard.path.name, f"{strays} documents are in the wrong split"))
    return findings


def _inside(shard: Shard) -> Iterator[str]:
    """What the shard's own words about its tokens get wrong."""
    try:
        shard.check_tokens()
        starts = shard.documents["start"].astype(np.int64)
    except CorruptError as error:
        yield error.what
        return
    header, tokens = shard.header, shard.tokens
    largest = int(tokens.max()) if len(tokens) else -1
    if largest != header.max_id:
        yield f"the largest id is {largest}, the header says {header.max_id}"
    if header.placement is None:  # ready tokens, their end-of-text wherever their maker put it
        return
    marks = _marks(tokens, header.eot, at_most=len(starts) + 1)
    expected = starts if header.placement == "before" else np.append(starts[1:], header.tokens)[: len(starts)] - 1
    if not np.array_equal(marks, expected):
        yield f"{len(marks)} end-of-text tokens are not where the sidecar's {len(starts)} documents meet"


def _marks(tokens: Tokens, eot: int, at_most: int) -> NDArray[np.int64]:
    """Where the end-of-text is, as far as there are not many more than there may be."""
    found = [np.empty(0, np.int64)]
    for at in range(0, len(tokens), BLOCK_TOKENS):
        found.append(at + np.flatnonzero(tokens[at : at + BLOCK_TOKENS] == eot))
        if sum(map(len, found)) > at_most:
            break
    return np.concatenate(found)
