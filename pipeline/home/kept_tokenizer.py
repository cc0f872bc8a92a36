"""The tokenizer in a run's folder: with it, the run is sampled from where its training data is not."""

import hashlib
import logging
from pathlib import Path
from typing import NamedTuple

from pipeline.home.layout import Layout, RunPaths
from pipeline.home.pins import PinnedFolder
from shards.atomic import make_folder, published_folder, read_whole
from shards.errors import CorruptError, MillpondError, RefusedError
from shards.manifest import MANIFEST, Manifest, TokenizerRecord, decode, encode
from shards.tokenizer import Tokenizer

logger = logging.getLogger(__name__)
RECORD = "record.json"
_MAX_BYTES = 64 << 20  # of one of its files


class Kept(NamedTuple):
    """A run's tokenizer, and the record by which it is compared with that of the weights."""

    tokenizer: Tokenizer
    record: TokenizerRecord


def keep(run: RunPaths, tokens: Path) -> None:
    """Copy the tokenizer of the token folder `tokens` into the run, in the place of one that may be there."""
    record = Manifest.read(tokens).tokenizer
    make_folder(run.root)
    with published_folder(run.tokenizer) as temp:
        for name, sha256 in (("tokenizer.tiktoken", record.ranks_sha256), ("tokenizer.json", record.json_sha256)):
            data = read_whole(tokens / name, _MAX_BYTES)
            if (found := hashlib.sha256(data).hexdigest()) != sha256:
                raise CorruptError(
                    f"{tokens / name}: sha256 is {found}, the manifest says {sha256}",
                    "with another tokenizer every token means something else",
                    "copy the file again from where it came, or millpond tokenize CONFIG --force",
                )
            (temp / name).write_bytes(data)
        (temp / RECORD).write_bytes(encode(record))


def record_of(run: RunPaths) -> TokenizerRecord | None:
    """What the run's tokenizer is; None where the run was begun before runs kept one."""
    path = run.tokenizer / RECORD
    return decode(read_whole(path, _MAX_BYTES), TokenizerRecord, path) if run.tokenizer.exists() else None


def load(layout: Layout, run: RunPaths, pinned: PinnedFolder) -> Kept:
    """The run's tokenizer; that of its token folder for a run from before runs kept one.

    RefusedError when neither has it.
    """
    if (record := record_of(run)) is not None:
        return Kept(Tokenizer.of_folder(run.tokenizer, record), record)
    tokens = layout.tokens / pinned.folder
    manifest = Manifest.read(tokens) if (tokens / MANIFEST).exists() else None
    if manifest is None or manifest.fingerprint != pinned.fingerprint:
        others = "" if manifest is None else ": those of this name are other ones"
        raise RefusedError(
            f"run {run.root.name} was begun before runs kept their tokenizer, and its tokens, {pinned.folder}, "
            f"are not in this home, {layout.home.absolute()}{others}",
            "without the tokenizer, ids cannot be turned into text",
            f"copy the folder tokens/{pinned.folder} here from the home where the run was trained; "
            "after that the run keeps its tokenizer",
        )
    return Kept(Tokenizer.of_folder(tokens, manifest.tokenizer), manifest.tokenizer)


def add(layout: Layout, run: RunPaths, pinned: PinnedFolder) -> None:
    """Have a run from before runs kept their tokenizer keep it, if it can be written to."""
    try:
        if not run.tokenizer.exists():
            keep(run, layout.tokens / pinned.folder)
    except MillpondError as error:  # a run of somebody else's may be asked
        logger.warning("%s\nthe run does not keep its tokenizer", error.what)
