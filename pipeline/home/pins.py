"""What a run was started on: its token folders, and how many of their parts it sees, whatever they grow to."""

from collections.abc import Mapping
from pathlib import Path

import msgspec

from pipeline.home.layout import Layout, RunPaths
from shards.errors import CorruptError
from shards.manifest import MANIFEST, Manifest, decode


class PinnedFolder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A token folder, how many of its parts a run sees, whatever it grows to, and its weight in a mixture."""

    folder: str
    fingerprint: str
    parts: int
    weight: float = 1.0


class Pinned(PinnedFolder, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """tokens.json of a run: its token folder, and the `others` of a mixture."""

    others: tuple[PinnedFolder, ...] = ()

    @property
    def folders(self) -> tuple[PinnedFolder, ...]:
        """All of them."""
        return (self, *self.others)

    def are_in(self, layout: Layout) -> bool:
        """Whether all of them are in this home."""
        return all((layout.tokens / one.folder / MANIFEST).exists() for one in self.folders)


def pin(weights: Mapping[Path, float]) -> Pinned:
    """The token folders as they are now, each with its weight; that of a single one means nothing."""
    first, *others = (_pin(folder, weight if len(weights) > 1 else 1.0) for folder, weight in weights.items())
    return Pinned(**msgspec.structs.asdict(first), others=tuple(others))


def pinned(run: RunPaths) -> Pinned:
    """The token folders as they were when the run began."""
    try:
        return decode(run.tokens.read_bytes(), Pinned, run.tokens)
    except (OSError, CorruptError) as error:
        raise CorruptError(
            f"{run.tokens}: cannot be read: {error if isinstance(error, OSError) else error.what}",
            "it says which tokens the run was started on",
            f"restore it, or start the run over: millpond train CONFIG --name {run.root.name} --fresh",
        ) from error


def _pin(folder: Path, weight: float) -> PinnedFolder:
    manifest = Manifest.read(folder)
    parts = len(manifest.parts)
    return PinnedFolder(folder=folder.name, fingerprint=manifest.fingerprint, parts=parts, weight=weight)
