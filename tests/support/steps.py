"""What tests of the step share: a small model with its optimizers, and batches that are always the same."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from train.config import ModelConfig, OptimConfig
from train.data.batch import Batch
from train.model.gpt import Model
from train.optim.groups import Optimizers
from train.step import Stepper

CONFIG = ModelConfig(n_layer=2, n_head=2, d_model=32, seq_len=16)
ADAMW = OptimConfig(name="adamw", lr=1e-3, eps=1e-8)


class Fixed:
    """Batches of `size` sequences, always the same ones in the same order."""

    def __init__(self, size: int) -> None:
        self.size, self.at = size, 0
        self.ids = torch.randint(0, 100, (64, 17), generator=torch.Generator().manual_seed(0))

    def next(self) -> Batch:
        rows = self.ids[self.at : self.at + self.size]
        self.at += self.size
        return Batch(rows[:, :-1], rows[:, 1:])


def stepper(optim: OptimConfig = ADAMW, config: ModelConfig = CONFIG, **settings: Any) -> Stepper:
    torch.manual_seed(0)
    model = Model(config, 100)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return Stepper(model, Optimizers(model, optim), 1.0, nullcontext, **settings)


def weights(of: Stepper) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in of.model.parameters()])
