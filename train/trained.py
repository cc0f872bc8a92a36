"""A trained model as it lies in a checkpoint of a run: the newest that is whole, or the best."""

from typing import NamedTuple

import torch

from shards.errors import RefusedError
from shards.manifest import TokenizerRecord
from train import checkpoint as checkpoints
from train.checkpoint import Checkpoint
from train.job import Job
from train.model import Model


class Trained(NamedTuple):
    """The model, on its device, and the step its weights are of."""

    model: Model
    step: int


def load_trained(job: Job, tokenizer: TokenizerRecord, device: torch.device, *, best: bool = False) -> Trained:
    """The newest whole checkpoint of a run, or the `best` by validation loss, on `device`.

    RefusedError when there is none, or when it is another recipe's or was trained with another tokenizer.
    """
    folder = job.checkpoints
    saved = checkpoints.load_best(folder) if best else checkpoints.load_latest(folder)
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
    _require_same_tokenizer(saved, tokenizer, model.embed.num_embeddings)
    model.load_state_dict(saved.model)
    return Trained(model.to(device).eval(), saved.progress.step)


def _require_same_tokenizer(saved: Checkpoint, tokenizer: TokenizerRecord, rows: int) -> None:
    """RefusedError unless the weights were trained on the ids of `tokenizer`, for which a model has `rows` embeddings.

    A checkpoint from before the tokenizer was in it has only the number of its own embeddings to tell.
    """
    before, found = saved.progress.tokenizer, len(saved.model["embed.weight"])
    if before is not None and before.ranks_sha256 != tokenizer.ranks_sha256:
        theirs = _said(before)
    elif found != rows:
        theirs = f"{found:,} embeddings"
    else:
        return
    raise RefusedError(
        f"the checkpoint of step {saved.step} was trained with {theirs}, the tokenizer here is {_said(tokenizer)}",
        "with another tokenizer every id means something else",
        "bring back the tokenizer or the token folder that the run was started with",
    )


def _said(tokenizer: TokenizerRecord) -> str:
    return f"{tokenizer.name} ({tokenizer.vocab_size:,} tokens, sha256 {tokenizer.ranks_sha256[:12]}…)"
