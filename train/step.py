"""One optimizer step: micro-batches forward and backward, clip, update. Nothing here waits for the device."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch

from train.loader import TokenLoader
from train.model import Model
from train.optim import Optimizers


class StepResult(NamedTuple):
    """Scalars still on the device: the batch's mean loss in nats per token, the gradient norm before clipping."""

    loss: torch.Tensor
    grad_norm: torch.Tensor


def train_step(
    model: Model,
    optimizers: Optimizers,
    loader: TokenLoader,
    accumulation: int,
    clip: float,
    autocast: Callable[[], AbstractContextManager[object]],
) -> StepResult:
    """Learn from the next `accumulation` micro-batches as from one batch: their gradients are averaged."""
    total = torch.zeros((), device=next(model.parameters()).device)
    for _ in range(accumulation):
        batch = loader.next()
        with autocast():
            loss = model.losses(batch.inputs, batch.targets).mean() / accumulation
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))
    optimizers.step()
    return StepResult(total, norm)
