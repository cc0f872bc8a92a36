"""A trained model as it lies in a checkpoint of a run: the newest that is whole, or the best."""

from typing import NamedTuple

import torch

from shards.errors import RefusedError
from train import checkpoint as checkpoints
from train.job import Job
from train.model import Model


class Trained(NamedTuple):
    """The model, on its device, and the step its weights are of."""

    model: Model
    step: int


def load_trained(job: Job, vocab_size: int, device: torch.device, *, best: bool = False) -> Trained:
    """The newest whole checkpoint of a run, or the `best` by validation loss, on `device`.

    RefusedError when there is none, or when it is another recipe's.
    """
    folder = job.checkpoints
    saved = checkpoints.load_best(folder) if best else checkpoints.load_latest(folder)
    if saved is None:
        raise RefusedError(
            f"{folder}: no checkpoint",
            "the run has not come to its first one, or they were removed",
            "wait for it, or train again, with --fresh if the run says that it is done",
        )
    job.require_same_recipe(saved.progress)
    model = Model(job.model, vocab_size)
    model.load_state_dict(saved.model)
    return Trained(model.to(device).eval(), saved.progress.step)
