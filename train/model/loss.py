"""The head and its loss in one, so that the logits of a whole batch are never in memory.

At a vocabulary of 50,304 they are what runs out first: 3 GiB in fp32 for 16 sequences of 1,024 tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}  # of logits at once, in the type of the products


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    softmax: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The mean cross-entropy in nats, () fp32, of `hidden` (N, D) @ `weight` (V, D).T against `targets` (N,) int64,
    each below `vocab_size`.

    Rows of `weight` from `vocab_size` on are padding: nothing is predicted by them and they get no gradient. Chunks of
    rows; the gradients are made in the forward pass, while a chunk's probabilities are there, and only scaled in the
    backward pass (Hsu et al. 2024, Liger Kernel, section 3.2), so that backward() works once. Products are made in
    autocast's type where it is on, sums in fp32. `softmax` is `softmax_`, or that function compiled.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    learns = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(hidden, weight, targets, vocab_size, softmax or softmax_, dtype, learns)  # type: ignore[no-any-return, no-untyped-call]


def softmax_(logits: Tensor) -> Tensor:
    """Replace `logits` (N, V) by their softmax; return its log-sum-exp, (N,) fp32.

    Compiled, this is one kernel, which works in place.
    """
    x = logits.float()
    top = x.amax(1, keepdim=True)
    x.sub_(top).exp_()
    sums = x.sum(1, keepdim=True)
    x.mul_(sums.reciprocal())
    if x is not logits:
        logits.copy_(x)
    return (sums.log() + top)[:, 0]


def chunk_rows(rows: int, most: int) -> int:
    """How many of `rows` to take at once, at most `most`: equal chunks, since each shape is compiled separately.

    Where only much smaller chunks than `most` would be equal, the last chunk is shorter than the others.
    """
    count = -(-rows // most)
    equal = next(chunks for chunks in range(count, rows + 1) if rows % chunks == 0)
    return -(-rows // (equal if equal < 4 * count else count))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int,
        softmax: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
        learns: bool,
    ) -> Tensor:
        device = hidden.device.type
        most = max(1, CHUNK_BYTES.get(device, 128 << 20) // (dtype.itemsize * len(weight)))
        rows = chunk_rows(len(hidden), most)
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if learns else hidden
        grad_weight = torch.zeros_like(weight) if learns else weight
        table = weight.to(dtype)
        buffer = torch.empty(rows, len(weight), dtype=dtype, device=hidden.device)
        with torch.autocast(device, enabled=False):
            for first in range(0, len(hidden), rows):
                chunk = slice(first, first + rows)
                inputs, expected = hidden[chunk].to(dtype), targets[chunk, None]
                logits = torch.mm(inputs, table.T, out=buffer[: len(inputs)])
                wanted = logits.gather(1, expected)[:, 0].float()
                logits[:, vocab_size:] = -torch.inf  # not in softmax_, which would ask for every logit where it is
                losses[chunk] = softmax(logits) - wanted
                if learns:  # the logits are probabilities now; less 1 at the target they are the loss's gradient
                    errors = logits.scatter_(1, expected, torch.expm1(-losses[chunk, None]).to(dtype))
                    grad_hidden[chunk] = errors @ table
                    _add_product(grad_weight, errors.T, inputs)
        if learns:
            ctx.save_for_backward(grad_hidden, grad_weight)
        return losses.mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        grad = grad / len(grad_hidden)
        return grad_hidden.mul_(grad), grad_weight.mul_(grad), None, None, None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to the fp32 `total`, in fp32 where the device multiplies 16-bit matrices into it."""
    if a.dtype is total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b
