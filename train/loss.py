"""The head and its loss in one, so that the logits of a whole batch are never in memory.

At a vocabulary of 50,304 they are what runs out first: 3 GiB in fp32 for 16 sequences of 1,024 tokens.
"""

from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}  # of fp32 logits at once


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """The mean cross-entropy in nats, () fp32, of `hidden` (N, D) @ `weight` (V, D).T against `targets` (N,) int64.

    Rows of `weight` from `vocab_size` on are padding: nothing is predicted by them and they get no gradient. Chunks of
    rows; the gradients are made in the forward pass, while a chunk's probabilities are there, and only scaled in the
    backward pass (Hsu et al. 2024, Liger Kernel, section 3.2), so that backward() works once. Products are made in
    autocast's type where it is on, sums in fp32.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    learns = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(hidden, weight, targets, vocab_size, dtype, learns)  # type: ignore[no-any-return, no-untyped-call]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, dtype: torch.dtype, learns: bool
    ) -> Tensor:
        rows = max(1, CHUNK_BYTES.get(hidden.device.type, 128 << 20) // (4 * len(weight)))
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if learns else hidden
        grad_weight = torch.zeros_like(weight) if learns else weight
        table = weight.to(dtype)
        buffer = torch.empty(min(rows, len(hidden)), len(weight), dtype=dtype, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for first in range(0, len(hidden), rows):
                chunk = slice(first, first + rows)
                inputs, expected = hidden[chunk].to(dtype), targets[chunk, None]
                logits = torch.mm(inputs, table.T, out=buffer[: len(inputs)]).float()
                logits[:, vocab_size:] = -torch.inf
                logits -= logits.amax(1, keepdim=True)
                wanted = logits.gather(1, expected)
                sums = logits.exp_().sum(1, keepdim=True)
                losses[chunk] = (sums.log() - wanted)[:, 0]
                if learns:
                    errors = logits.div_(sums).scatter_add_(1, expected, wanted.new_full(wanted.shape, -1))
                    errors = errors.to(dtype)
                    grad_hidden[chunk] = errors @ table
                    if dtype is weight.dtype:
                        grad_weight.addmm_(errors.T, inputs)
                    else:
                        grad_weight += errors.T @ inputs
        if learns:
            ctx.save_for_backward(grad_hidden, grad_weight)
        return losses.mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        grad = grad / len(grad_hidden)
        return grad_hidden.mul_(grad), grad_weight.mul_(grad), None, None, None, None
