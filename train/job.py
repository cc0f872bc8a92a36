"""What a run is given, what it tells on the way, and how it ends."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from train.checkpoint import Best
from train.config import ModelConfig, OptimConfig, TrainConfig
from train.evaluate import Evaluation
from train.metrics import Row
from train.sources import Source

Emit = Callable[[str, Row], None]  # ("start" | "log" | "eval" | "sample" | "save" | "rollback" | "end", row)


class Job(NamedTuple):
    """What to train on what, and where to write it.

    `recipe` is the fingerprint of all that can change what is learned.
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


class Result(NamedTuple):
    """How a finished run ended."""

    steps: int
    tokens: int
    evaluation: Evaluation
    weights_sha256: str
    best: Best | None
