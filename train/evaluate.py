"""Validation loss on fixed windows: the same tokens at every evaluation of every run over the same folder."""

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from shards.reader import TokenStream
from train.model import Model
from train.windows import window_count

logger = logging.getLogger(__name__)


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
    """The loss over the first `eval_tokens` targets of `stream` (whole windows, all if there are fewer), in order.

    `batch_size` windows at once, and half as many from where the memory runs out on.
    """
    seq_len = model.config.seq_len
    device = next(model.parameters()).device
    windows = min(window_count(len(stream), seq_len), max(1, eval_tokens // seq_len))
    losses: list[torch.Tensor] = []  # of whole batches, left on the device: nothing waits for it before the end
    counts: list[int] = []
    nbytes = first = 0
    training = model.training
    model.eval()
    while first < windows:
        count = min(batch_size, windows - first)
        rows = [stream.window((first + i) * seq_len, seq_len + 1) for i in range(count)]
        tokens = torch.from_numpy(np.stack(rows).astype(np.int64))
        whole = count == batch_size or model.compiled_hidden is None
        # a rest has a shape of its own, and to compile it takes longer than to compute it
        stance = nullcontext() if whole else torch.compiler.set_stance("force_eager")
        try:
            with autocast(), stance:
                losses.append(model.loss(tokens[:, :-1].to(device), tokens[:, 1:].to(device)))
        except torch.OutOfMemoryError:
            if count == 1:
                raise
            batch_size = -(-count // 2)
            logger.warning("evaluation: out of memory with %d sequences at once: going on with %d", count, batch_size)
            continue
        nbytes += int(byte_lengths[tokens[:, 1:].numpy()].sum())
        counts.append(count * seq_len)
        first += count
    model.train(training)
    nats = (torch.stack(losses).cpu().double() * torch.tensor(counts)).sum().item()
    return Evaluation(nats / (windows * seq_len), nats / math.log(2) / max(1, nbytes), windows * seq_len)
