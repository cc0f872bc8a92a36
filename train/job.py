"""What a run is given, what it tells on the way, and how it ends."""

from pathlib import Path
from typing import Any, NamedTuple

from shards.errors import RefusedError
from shards.fingerprint import differences
from shards.manifest import TokenizerRecord
from train.config import ModelConfig, OptimConfig, TrainConfig, neutral_tables
from train.data.sources import Source
from train.evaluate import Evaluation
from train.state.checkpoint import Best, Progress


class Job(NamedTuple):
    """What to train on what, and where to write it.

    `recipe` is the fingerprint of all that can change what is learned, `identity` all of it, by table and field. Of a
    run that was made longer, `earlier` has each fingerprint of before, and up to which step it was the run's.
    """

    recipe: str
    model: ModelConfig
    optim: OptimConfig
    train: TrainConfig
    sources: tuple[Source, ...]
    checkpoints: Path
    metrics: Path
    samples: Path
    fits: Path | None = None  # the micro-batches found on this machine, for all runs
    identity: dict[str, Any] | None = None
    earlier: tuple[tuple[str, int], ...] = ()

    def require_same_recipe(self, progress: Progress) -> None:
        """RefusedError, with the fields that differ where the checkpoint has them, when it is another recipe's."""
        known = progress.recipe == self.recipe
        if known or any(progress.recipe == recipe and progress.step <= until for recipe, until in self.earlier):
            return
        fields = f"  sha256 {progress.recipe[:12]}… -> {self.recipe[:12]}…; the checkpoint does not have the fields"
        if progress.identity and self.identity:
            fields = "\n".join(map(str, differences(progress.identity, self.identity, neutral_tables())))
        raise RefusedError(
            f"{self.checkpoints}: the checkpoint of step {progress.step} was made with another recipe than the run's:\n"
            + fields,
            "run.toml or tokens.json was edited, or the checkpoint copied: its weights belong to its own recipe",
            "undo that, or use millpond train with --name OTHER for a new run, with --fresh to start this one over",
        )


def require_same_tokenizer(progress: Progress, tokenizer: TokenizerRecord) -> None:
    """RefusedError when the checkpoint was trained on other ids than those of `tokenizer`, as far as it says that."""
    before = progress.tokenizer
    if before is not None and before.ranks_sha256 != tokenizer.ranks_sha256:
        raise other_tokenizer(progress, str(before), tokenizer)


def other_tokenizer(progress: Progress, before: str, tokenizer: TokenizerRecord) -> RefusedError:
    """Why `tokenizer` is none for weights that were trained with `before`."""
    return RefusedError(
        f"the checkpoint of step {progress.step} was trained with {before}, the tokenizer is {tokenizer}",
        "with another tokenizer every id means something else",
        "bring back the tokenizer or the token folder that the run was started with",
    )


class Result(NamedTuple):
    """How a finished run ended."""

    steps: int
    tokens: int
    evaluation: Evaluation
    weights_sha256: str
    best: Best | None
