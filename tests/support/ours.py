"""Our step as a run has it, for what times a step without a run around it."""

import torch

from train.config import ModelConfig, OptimConfig, TrainConfig
from train.machine.compile import compile_model, wants_compile
from train.machine.device import autocast, loss_scaler, resolve_precision
from train.model.gpt import Model
from train.optim.groups import Optimizers
from train.step import Stepper


def our_stepper(
    config: ModelConfig, optim: OptimConfig, train: TrainConfig, vocab_size: int, device: torch.device
) -> Stepper:
    """A model drawn with `train.seed`, on `device`, compiled if `train.compile` says so, with its optimizers."""
    precision = resolve_precision(train, device)
    torch.manual_seed(train.seed)
    model = Model(config, vocab_size).to(device)
    model.checkpoint_activations = train.checkpoint_activations
    if wants_compile(train, device):
        compile_model(model)
    optimizers, scaler = Optimizers(model, optim), loss_scaler(device, precision)
    return Stepper(model, optimizers, optim.clip, lambda: autocast(device, precision), scaler)
