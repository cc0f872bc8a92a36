"""The token folders of a home: which there are, what is in them, which of them no run needs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.home import pins
from pipeline.home.layout import Layout
from shards.atomic import discard, locked, make_folder, sweep
from shards.errors import ConfigError, CorruptError, MillpondError, RefusedError
from shards.manifest import MANIFEST, Manifest, Split
from shards.reader import TokenFolder
from shards.verify import verify as find_damage

MOST_FILES = 20  # damaged ones that are named


class FolderSummary(NamedTuple):
    """One token folder: `state` says whether it is complete, `runs` are those that were started on it."""

    folder: str
    state: str
    train_tokens: int
    val_tokens: int
    parts: int
    tokenizer: str
    nbytes: int
    runs: list[str]


def find(layout: Layout, folder: str) -> Path:
    """A token folder by its path or by its name under the home; ConfigError that lists those there are."""
    for path in (layout.tokens / folder, Path(folder).expanduser()):
        if (path / MANIFEST).exists():
            return path
    for path in (layout.tokens / folder, Path(folder).expanduser()):
        if any(path.glob("train-*.bin")) or (path / ".parts").exists():
            raise ConfigError(
                f"{path.absolute()}: has no {MANIFEST}: {_unfinished(path)}",
                "the manifest says which files belong to the folder and what their hashes are",
                "the command that made it: millpond prepare CONFIG, or millpond shards pull PLACE",
            )
    names = ", ".join(row.folder for row in table(layout)) or "none yet"
    where = layout.tokens.absolute()
    raise ConfigError(f"no token folder {folder!r}", f"under {where} there are: {names}", "millpond shards ls")


def _unfinished(path: Path) -> str:
    """The state of a folder without a manifest."""
    sealed = len(list((path / ".parts").glob("[0-9]*.json")))
    if (path / ".parts").exists():
        return f"unfinished, {sealed} parts sealed"
    return f"no manifest, {len(list(path.glob('*-*.bin')))} shards"


def table(layout: Layout) -> list[FolderSummary]:
    """Every token folder under the home. What cannot be read says so in its own row."""
    used = users(layout, strict=False)
    found = [path for path in sorted(layout.tokens.glob("[!.]*")) if path.is_dir()]
    return [_row(path, used.get(path.name, [])) for path in found]


def statistics(path: Path) -> dict[str, Any]:
    """What is in a folder, for a program to read. `lengths` counts documents by their tokens, in powers of two."""
    folder = TokenFolder(path)
    manifest, counts = folder.manifest, folder.manifest.counts
    lengths = np.concatenate([_lengths(folder, split) for split in ("train", "val")])
    edges = [1 << i for i in range(int(lengths.max(initial=1)).bit_length() + 1)]
    histogram, _ = np.histogram(lengths, edges)
    return {
        "folder": path.name,
        "corpus": {"kind": manifest.corpus.kind, "name": manifest.corpus.name, **manifest.corpus.details},
        "tokenizer": manifest.tokenizer.name,
        "vocab_size": manifest.tokenizer.vocab_size,
        "complete": manifest.complete,
        "parts": len(manifest.parts),
        "sources": len(manifest.sources),
        "train_tokens": manifest.tokens("train"),
        "val_tokens": manifest.tokens("val"),
        "documents": len(lengths),
        "text_bytes": counts.text_bytes,
        "bytes_per_token": counts.text_bytes / max(1, manifest.tokens("train") + manifest.tokens("val")),
        "rows": counts.rows,
        "dropped": counts.dropped,
        "repaired": counts.repaired,
        "literal_eot": counts.literal_eot,
        "median_length": int(np.median(lengths)) if len(lengths) else 0,
        "longest": int(lengths.max(initial=0)),
        "lengths": {f"{low}-{2 * low - 1}": int(count) for low, count in zip(edges, histogram, strict=False) if count},
    }


def document(path: Path, split: Split, number: int) -> str:
    """The text of one document of a split, counted from 0 through all its shards. ConfigError when there is none."""
    folder = TokenFolder(path)
    left = number
    for shard in folder.shards(split):
        if 0 <= left < shard.header.documents:
            ids, eot = shard.document(left).tolist(), folder.tokenizer.eot
            return folder.tokenizer.decode(ids[ids[:1] == [eot] : len(ids) - (ids[-1:] == [eot] and len(ids) > 1)])
        left -= shard.header.documents
    total = sum(shard.header.documents for shard in folder.shards(split))
    raise ConfigError(f"{path.name}: no document {number} in {split}", f"it has {total:,}, counted from 0", "--doc N")


def require_valid(layout: Layout, path: Path, fix: str, *, full: bool) -> None:
    """CorruptError, with what is damaged and `fix`, unless a folder is what its manifest says.

    By sizes and headers or, when `full`, by every byte. Damage that is found is looked for again before the next use.
    """
    if damaged := find_damage(path, full=full):
        layout.receipt("verify", path.name).unlink(missing_ok=True)
        raise CorruptError(
            f"{path}: damaged files: {len(damaged):,}\n"
            + "\n".join(f"  {finding.file}: {finding.what}" for finding in damaged[:MOST_FILES]),
            "training would use corrupted tokens",
            fix,
        )


def garbage(layout: Layout) -> list[FolderSummary]:
    """The token folders that no run was started on. CorruptError when a run does not say which one it was."""
    used = users(layout, strict=True)
    rows = [row for row in table(layout) if row.folder not in used]
    return [row for row in rows if not (layout.tokens / row.folder).is_symlink()]


@contextmanager
def exclusive(layout: Layout, folder: str) -> Iterator[None]:
    """Keep all others from preparing, pulling or deleting a token folder; RefusedError when one of them is at it."""

    def when_held() -> None:
        raise RefusedError(
            f"{folder}: another process is working on it",
            "preparing, pulling and deleting a token folder exclude one another",
            "wait until it has ended, then run the same command again",
        )

    make_folder(layout.locks)
    with locked(layout.lock(folder), when_held):
        yield


def remove(layout: Layout, row: FolderSummary) -> None:
    """Delete a token folder that no run was started on. RefusedError when one was by now, or it is being worked on."""
    with exclusive(layout, row.folder):
        if used := users(layout, strict=True).get(row.folder):
            raise RefusedError(f"{row.folder}: run {used[0]} was started on it", "the run could not resume without it")
        discard(layout.tokens / row.folder)


def sweep_removed(layout: Layout) -> None:
    """End what a killed `remove` began. No lock is needed: only folders on their way out have such names here."""
    sweep(layout.tokens)


def users(layout: Layout, *, strict: bool) -> dict[str, list[str]]:
    """The runs of each folder. When `strict`, a CorruptError for one that does not say: it might be any."""
    found: dict[str, list[str]] = {}
    for path in sorted({*layout.runs.glob("*/tokens.json"), *layout.runs.glob("*/run.toml")}):
        try:
            pinned = pins.pinned(layout.run(path.parent.name))
        except CorruptError:
            if strict:
                raise
            continue
        for one in pinned.folders:
            if path.parent.name not in found.setdefault(one.folder, []):
                found[one.folder].append(path.parent.name)
    return found


def _row(path: Path, users: list[str]) -> FolderSummary:
    nbytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    if not (path / MANIFEST).exists():
        return FolderSummary(path.name, _unfinished(path), 0, 0, 0, "", nbytes, users)
    try:
        manifest = Manifest.read(path)
    except MillpondError:
        return FolderSummary(path.name, "damaged", 0, 0, 0, "", nbytes, users)
    state = "complete" if manifest.complete else "grows with max_tokens"
    tokens = manifest.tokens("train"), manifest.tokens("val")
    return FolderSummary(path.name, state, *tokens, len(manifest.parts), manifest.tokenizer.name, nbytes, users)


def _lengths(folder: TokenFolder, split: Split) -> "np.ndarray[Any, np.dtype[np.int64]]":
    found = [np.empty(0, np.int64)]
    for shard in folder.shards(split):
        starts = shard.documents["start"].astype(np.int64)
        found.append(np.diff(np.append(starts, shard.header.tokens)))
    return np.concatenate(found)
