"""Validation loss on fixed windows: the same tokens at every evaluation of every run over the same folder."""

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from train.data.document_ends import ends_of
from train.data.sources import OpenSources
from train.data.windows import FolderWindows
from train.machine.memory import is_out_of_memory
from train.machine.ranks import World
from train.model.gpt import Model

logger = logging.getLogger(__name__)


class Evaluation(NamedTuple):
    """What predicting `tokens` tokens cost, which are `nbytes` bytes of text; of a mixture, the loss of each."""

    nats: float
    nbytes: int
    tokens: int
    by_folder: tuple[tuple[str, float], ...] = ()

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def bpb(self) -> float:
        """Bits per byte of text; end-of-text has no bytes, but its nats count."""
        return self.nats / math.log(2) / max(1, self.nbytes)

    def row(self) -> dict[str, Any]:
        """As it is written down."""
        found: dict[str, Any] = {"val_loss": self.loss, "val_bpb": self.bpb, "val_tokens": self.tokens}
        return {**found, "val_loss_by_folder": dict(self.by_folder)} if self.by_folder else found


@torch.no_grad()
def evaluate(
    model: Model,
    windows: FolderWindows,
    byte_lengths: NDArray[np.int64],
    eval_tokens: int,
    batch_size: int,
    autocast: Callable[[], AbstractContextManager[object]],
    *,
    document_mask: bool = False,
    world: World | None = None,
) -> Evaluation:
    """The loss over the first `eval_tokens` targets of `windows` (whole ones, all if there are fewer), in their order.

    `batch_size` windows at once, and half as many from where the memory runs out on. With `document_mask`, attention
    ends where documents do. Each rank of `world` reads a part, and all get the whole's result, the same bits.
    """
    seq_len = model.config.seq_len
    device = next(model.parameters()).device
    whole_windows = min(windows.count, max(1, eval_tokens // seq_len))
    losses: list[torch.Tensor] = []  # of whole batches, left on the device: nothing waits for it before the end
    counts: list[int] = []
    world = world or World()
    first, last = (whole_windows * rank // world.size for rank in (world.rank, world.rank + 1))
    nbytes = 0
    training = model.training
    model.eval()
    while first < last:
        count = min(batch_size, last - first)
        rows = np.empty((count, seq_len + 1), windows.dtype)
        windows.read(first, list(rows))
        tokens, documents = torch.from_numpy(rows.astype(np.int64)), None
        if document_mask:
            boundaries = windows.boundaries(first, np.arange(count))
            ends = ends_of(boundaries, count, seq_len, windows.documents_per_window)
            documents = torch.from_numpy(ends).to(device)
        whole = count == batch_size or model.compiled_hidden is None
        # a rest has a shape of its own, and to compile it takes longer than to compute it
        stance = nullcontext() if whole else torch.compiler.set_stance("force_eager")
        try:
            with autocast(), stance:
                there = tokens.to(device)  # cut there: training has these strides, and others would be compiled again
                losses.append(model.loss(there[:, :-1], there[:, 1:], documents))
        except RuntimeError as error:
            if count == 1 or not is_out_of_memory(error):
                raise
            batch_size = -(-count // 2)
            logger.warning("evaluation: out of memory with %d sequences at once: continuing with %d", count, batch_size)
            continue
        nbytes += int(byte_lengths[tokens[:, 1:].numpy()].sum())
        counts.append(count * seq_len)
        first += count
    model.train(training)
    mine = (torch.stack(losses).cpu().double() * torch.tensor(counts)).sum().item() if losses else 0.0
    nats, nbytes_in_all = world.sum(mine, nbytes)
    return Evaluation(nats, int(nbytes_in_all), whole_windows * seq_len)


def together(found: Mapping[str, Evaluation]) -> Evaluation:
    """The evaluations of several folders as one: each token counts the same."""
    each = found.values()
    whole = Evaluation(sum(one.nats for one in each), sum(one.nbytes for one in each), sum(one.tokens for one in each))
    return whole._replace(by_folder=tuple((name, one.loss) for name, one in found.items())) if len(found) > 1 else whole


def measure(
    sources: OpenSources,
    model: Model,
    eval_tokens: int,
    batch_size: int,
    autocast: Callable[[], AbstractContextManager[object]],
    *,
    document_mask: bool,
    world: World | None = None,
) -> Evaluation:
    """The validation loss over the first `eval_tokens` targets, of each folder as many as is its share; 0: all."""
    found = {}
    for folder, windows, tokens in sources.validation(eval_tokens):
        lengths = folder.tokenizer.byte_lengths
        found[folder.path.name] = evaluate(
            model, windows, lengths, tokens, batch_size, autocast, document_mask=document_mask, world=world
        )
    return together(found)
