"""Every path under the home folder is made here, so that moving one is a change of one line."""

import os
from pathlib import Path

from shards.atomic import make_folder, nearest_existing
from shards.errors import HostError
from shards.manifest import folder_name


class RunPaths:
    """The files of one run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.recipe = root / "run.toml"  # resolved, with every default
        self.tokens = root / "tokens.json"  # the token folders and the parts that the run was started with
        self.tokenizer = root / "tokenizer"  # the folder of the run's own copy
        self.checkpoints = root / "checkpoints"  # one folder a checkpoint
        self.metrics = root / "metrics.jsonl"  # one row of numbers a log step or evaluation
        self.samples = root / "samples.jsonl"  # one row a sample
        self.tensorboard = root / "tensorboard"  # its event files, where they are asked for
        self.evaluation = root / "evaluation.json"  # the receipt of the newest evaluation
        self.export = root / "export"  # the model in the formats of others
        self.receipt = root / "receipt.json"  # written last: the run is finished

    def former_receipt(self, steps: int) -> Path:
        """The receipt of the end that the run had after `steps` steps, before it was made longer."""
        return self.root / f"receipt-{steps:06}.json"


class Layout:
    """Where things are under one home."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.tokens = home / "tokens"  # one token folder each
        self.runs = home / "runs"  # one run each
        self.locks = home / "locks"  # one file for each thing that is being worked on
        self.fits = home / "fits.json"  # the micro-batches that were found best, for all runs
        self.compiled = home / "compiled"  # what torch has compiled, which a resumed run need not compile again

    def raw(self, corpus: str) -> Path:
        """A corpus's source files and its lock.json."""
        return self.home / "raw" / corpus

    def token_folder(self, corpus: str, fingerprint: str) -> Path:
        """One token folder."""
        return self.tokens / folder_name(corpus, fingerprint)

    def run(self, name: str) -> RunPaths:
        """One run's files."""
        return RunPaths(self.runs / name)

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
