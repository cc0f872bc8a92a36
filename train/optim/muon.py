"""Muon: momentum, made orthogonal, for the matrices of the blocks (Jordan et al. 2024, github.com/KellerJordan/Muon).

torch.optim.Muon's mathematics, "original" rates, with the matrices of one shape done together: a few large kernels in
place of a dozen small ones for each. And a step can be called off on the device, without the host being told.
"""

import math
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

STEPS = 5
COEFFICIENTS = 3.4445, -4.7750, 2.0315  # steepest at zero: the singular values end up near 1, not at it
EPS = 1e-7


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; decoupled weight decay; rates scaled by sqrt(max(1, rows / columns)).

    Takes matrices only, each of which is orthogonalised for itself.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None, *, ok: Tensor | None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient. Where `ok`, a 0-d bool on the device, is false, nothing moves."""
        for group in self.param_groups:
            alike: dict[tuple[torch.Size, torch.device], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault((parameter.shape, parameter.device), []).append(parameter)
            for parameters in alike.values():
                self._update(parameters, group, ok)

    def _update(self, parameters: list[Tensor], group: dict[str, Any], ok: Tensor | None) -> None:
        momenta = [self._momentum_of(parameter) for parameter in parameters]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if ok is not None:  # a momentum that is pulled towards itself does not move
            gradients = [torch.where(ok, *pair) for pair in zip(gradients, momenta, strict=True)]
        directions = torch.stack(gradients)
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        torch._foreach_lerp_(list(directions.unbind()), momenta, group["momentum"])
        updates = orthogonalize(directions).to(directions.dtype)
        rows, columns = parameters[0].shape
        rate = group["lr"] * math.sqrt(max(1.0, rows / columns))
        decay = group["lr"] * group["weight_decay"]
        if ok is None:
            torch._foreach_mul_(parameters, 1 - decay)
            updates *= -rate
        else:
            torch._foreach_mul_(parameters, 1 - decay * ok)
            updates *= -rate * ok
        torch._foreach_add_(parameters, list(updates.unbind()))

    def _momentum_of(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum: Tensor = state["momentum_buffer"]
        return momentum


def orthogonalize(matrices: Tensor) -> Tensor:
    """(n, rows, columns) -> the same, all singular values near 1: five quintic Newton-Schulz steps.

    On CUDA the answer is bf16 where the GPU computes in it, which is precise enough and fastest. Elsewhere it is fp32:
    a CPU gives the same then whether it knows bf16 or not, and the order of a sum shows in the seventh digit only.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.to(_precision(matrices.device))
    if tall:
        x = x.mT
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=EPS)  # the largest singular value is at most 1
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


@cache
def _precision(device: torch.device) -> torch.dtype:
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if bf16 else torch.float32
