"""A trained model from a checkpoint of a run: the one that was chosen."""

from typing import NamedTuple

import torch

from shards.errors import RefusedError
from shards.manifest import TokenizerRecord
from train.job import Job, other_tokenizer, require_same_tokenizer
from train.model.gpt import Model
from train.state import checkpoint as checkpoints
from train.state.checkpoint import Progress


class Trained(NamedTuple):
    """The model, on its device, and where its run was with these weights."""

    model: Model
    progress: Progress

    @property
    def step(self) -> int:
        """How many steps it has learned from."""
        return self.progress.step


def load_trained(job: Job, tokenizer: TokenizerRecord, device: torch.device, *, checkpoint: str = "newest") -> Trained:
    """A run's checkpoint, chosen as checkpoint.load_chosen says, on `device`.

    RefusedError when it is not there, or when it is another recipe's or was trained with another tokenizer.
    """
    folder = job.checkpoints
    saved = checkpoints.load_chosen(folder, checkpoint)
    if saved is None:
        name = folder.parent.name
        raise RefusedError(
            f"{folder}: no checkpoint",
            "the run has not come to its first one, or they were removed",
            f"wait for it, or millpond resume {name}; if that says it is done, "
            f"millpond train with --name {name} --fresh",
        )
    job.require_same_recipe(saved.progress)
    model = Model(job.model, tokenizer.vocab_size)
    require_same_tokenizer(saved.progress, tokenizer)
    if (rows := len(saved.model["embed.weight"])) != model.embed.num_embeddings:  # an older checkpoint says no more
        raise other_tokenizer(saved.progress, f"{rows:,} embeddings", tokenizer)
    model.load_state_dict(saved.model)
    return Trained(model.to(device).eval(), saved.progress)
