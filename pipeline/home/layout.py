"""Every path under the home folder is made here, so that moving one is a change of one line."""

import os
from pathlib import Path
from typing import NamedTuple

from shards.atomic import make_folder, nearest_existing
from shards.errors import HostError
from shards.manifest import folder_name


class RunPaths(NamedTuple):
    """The files of one run."""

    root: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe, as TOML."""
        return self.root / "run.toml"

    @property
    def tokens(self) -> Path:
        """The token folders and the parts that the run was started with."""
        return self.root / "tokens.json"

    @property
    def tokenizer(self) -> Path:
        """The folder of the run's own copy of its tokenizer."""
        return self.root / "tokenizer"

    @property
    def receipt(self) -> Path:
        """Written last: the run is finished."""
        return self.root / "receipt.json"

    def former_receipt(self, steps: int) -> Path:
        """The receipt of the end that the run had after `steps` steps, before it was made longer."""
        return self.root / f"receipt-{steps:06}.json"

    @property
    def evaluation(self) -> Path:
        """The receipt of the newest evaluation."""
        return self.root / "evaluation.json"

    @property
    def metrics(self) -> Path:
        """One row of numbers a log step or evaluation."""
        return self.root / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """One row a sample."""
        return self.root / "samples.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files, where it is asked for."""
        return self.root / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """One folder a checkpoint."""
        return self.root / "checkpoints"


class Layout(NamedTuple):
    """Where things are under one home."""

    home: Path

    def raw(self, corpus: str) -> Path:
        """A corpus's source files and its lock.json."""
        return self.home / "raw" / corpus

    @property
    def tokens(self) -> Path:
        """All token folders."""
        return self.home / "tokens"

    def token_folder(self, corpus: str, fingerprint: str) -> Path:
        """One token folder."""
        return self.tokens / folder_name(corpus, fingerprint)

    @property
    def runs(self) -> Path:
        """All runs."""
        return self.home / "runs"

    def run(self, name: str) -> RunPaths:
        """One run's files."""
        return RunPaths(self.runs / name)

    @property
    def fits(self) -> Path:
        """The micro-batches that were found best, one file for all runs."""
        return self.home / "fits.json"

    @property
    def compiled(self) -> Path:
        """What torch has compiled, which a resumed run need not compile again."""
        return self.home / "compiled"

    def keep_compiled(self) -> None:
        """Have torch keep what it compiles under this home, unless the user has named another place for it.

        Nor where it could not be written: torch would fail, and not only when it compiles.
        """
        place = nearest_existing(self.compiled)
        if place.is_dir() and os.access(place, os.W_OK | os.X_OK):
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(self.compiled.absolute()))

    def receipt(self, stage: str, target: str) -> Path:
        """The receipt of a stage that has no folder of its own to put it in."""
        return self.home / "receipts" / f"{stage}-{target}.json"

    @property
    def locks(self) -> Path:
        """All lock files."""
        return self.home / "locks"

    def lock(self, target: str) -> Path:
        """Held by the one process that works on `target`."""
        return self.locks / f"{target}.lock"

    def require_writable(self) -> None:
        """Make the home folder; HostError when nothing can be written there, before any work is done."""
        make_folder(self.home)
        if not os.access(self.home, os.W_OK | os.X_OK):
            raise HostError(
                f"{self.home}: not writable",
                "shards, runs and receipts are written there; nothing was changed",
                "make it writable, or choose another place with --home DIR",
            )
