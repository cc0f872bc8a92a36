"""Validation loss on fixed windows: the same tokens at every evaluation of every run over the same folder."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from shards.reader import TokenStream
from train.model import Model
from train.windows import window_count


class Evaluation(NamedTuple):
    """`loss` in nats per token, `bpb` in bits per byte of text (end-of-text has no bytes, but its nats count)."""

    loss: float
    bpb: float
    tokens: int


@torch.no_grad()
def evaluate(
    model: Model,
    stream: TokenStream,
    byte_lengths: NDArray[np.int64],
    eval_tokens: int,
    batch_size: int,
    autocast: Callable[[], AbstractContextManager[object]],
) -> Evaluation:
    """The loss over the first `eval_tokens` targets of `stream` (whole windows, all if there are fewer), in order."""
    seq_len = model.config.seq_len
    device = next(model.parameters()).device
    windows = min(window_count(len(stream), seq_len), max(1, eval_tokens // seq_len))
    nats = torch.zeros((), dtype=torch.float64)
    nbytes = 0
    training = model.training
    model.eval()
    for first in range(0, windows, batch_size):
        count = min(batch_size, windows - first)
        rows = [stream.window((first + i) * seq_len, seq_len + 1) for i in range(count)]
        tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
        nbytes += int(byte_lengths[tokens[:, 1:].numpy()].sum())
        tokens = tokens.to(device)
        with autocast():
            losses = model.losses(tokens[:, :-1], tokens[:, 1:])
        nats += losses.double().sum().cpu()
    model.train(training)
    loss = nats.item() / (windows * seq_len)
    return Evaluation(loss, nats.item() / math.log(2) / max(1, nbytes), windows * seq_len)
