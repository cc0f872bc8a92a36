"""A trained model as it lies in a checkpoint of a run: the newest that is whole, or the best."""

from pathlib import Path
from typing import NamedTuple

import torch

from shards.errors import RefusedError
from train import checkpoint as checkpoints
from train.config import ModelConfig
from train.model import Model


class Trained(NamedTuple):
    """The model, on its device, and the step its weights are of."""

    model: Model
    step: int


def load_trained(
    folder: Path, recipe: str, config: ModelConfig, vocab_size: int, device: torch.device, *, best: bool = False
) -> Trained:
    """The newest whole checkpoint in `folder`, or the `best` by validation loss, on `device`.

    RefusedError when there is none, or when it is another recipe's.
    """
    saved = checkpoints.load_best(folder) if best else checkpoints.load_latest(folder)
    if saved is None:
        raise RefusedError(
            f"{folder}: no checkpoint",
            "the run has not come to its first one, or they were removed",
            "wait for it, or train again, with --fresh if the run says that it is done",
        )
    if saved.progress.recipe != recipe:
        raise RefusedError(
            f"{folder}: the checkpoint was made with another recipe than run.toml says",
            "its weights do not belong to the model that is described there",
            "undo the change in run.toml",
        )
    model = Model(config, vocab_size)
    model.load_state_dict(saved.model)
    return Trained(model.to(device).eval(), saved.progress.step)
