"""torch.compile where it is wanted, and the same function uncompiled where it fails."""

import logging
from collections.abc import Callable
from typing import Any, assert_never

import torch
from torch import Tensor

from train.config import TrainConfig
from train.model.gpt import Model
from train.model.loss import softmax_

logger = logging.getLogger(__name__)


def wants_compile(config: TrainConfig, device: torch.device) -> bool:
    """Whether `train.compile` means yes on this device."""
    match config.compile:
        case "on":
            return True
        case "off":
            return False
        case "auto":
            return device.type == "cuda"
        case _:
            assert_never(config.compile)


def compile_model(model: Model) -> None:
    """Compile the layers of `model` and its loss, each at its first call with a new shape.

    What an earlier model had compiled is forgotten: a function is only compiled for so many shapes.
    """
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters["stats"].clear()
    model.compiled_hidden, model.compiled_softmax = OrEager(model.hidden), OrEager(softmax_)


def compiled_graphs(model: Model) -> int:
    """How many graphs were compiled for `model` so far; a backward graph counts with its forward graph."""
    if model.compiled_hidden is None:
        return 0
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


class OrEager:
    """`function` compiled by torch, or uncompiled from the first failure to compile it on (no Triton, no C compiler).

    Each shape is compiled separately, which takes a minute for a big model: call it with few.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        import torch._functorch.config

        # Otherwise the backward graph is compiled inside backward(), where a failure ends the run.
        torch._functorch.config.force_non_lazy_backward_lowering = True
        self._eager = function
        self._compiled: Callable[..., Tensor] | None = torch.compile(function, fullgraph=True, dynamic=False)

    @property
    def is_compiled(self) -> bool:
        """Whether nothing has failed yet."""
        return self._compiled is not None

    def __call__(self, *inputs: Any) -> Tensor:
        """`function` of `inputs`."""
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        if self._compiled is not None:
            try:
                return self._compiled(*inputs)
            except (TorchDynamoException, FailOnRecompileLimitHit) as error:
                reason = " ".join(str(error).split("\n\n")[0].split())
                logger.warning(
                    "torch.compile failed on %s(), which runs uncompiled from now on, slower, same result: %s\n"
                    "train.compile=off asks for that from the start",
                    self._eager.__name__,
                    reason,
                )
                self._compiled = None
        return self._eager(*inputs)
