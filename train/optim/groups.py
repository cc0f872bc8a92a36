"""Which parameter is learned by which optimizer, at which rate, and whether it decays."""

from typing import Any, assert_never

import torch
from torch import Tensor, nn

from train.config import OptimConfig
from train.model.gpt import Model
from train.optim.muon import Muon
from train.schedule import lr_factor, momentum


class Optimizers:
    """One AdamW, or Muon for the matrices of the blocks and AdamW for the rest.

    Only matrices decay, unless `decay` is `all`: embeddings, biases and norm gains have no scale to lose.
    """

    def __init__(self, model: Model, config: OptimConfig) -> None:
        self.config = config
        muon = _has_muon(config)
        everywhere = _decay_everywhere(config)
        matrices, embeddings, head, rest = _groups(model)
        adamw: list[dict[str, Any]] = [
            {"params": embeddings, "lr": config.embed_lr if muon else config.lr, "weight_decay": everywhere},
            {
                "params": head,
                "lr": config.head_lr if muon else config.lr,
                "weight_decay": everywhere if muon else config.weight_decay,
            },
            {"params": rest, "lr": config.norm_lr if muon else config.lr, "weight_decay": everywhere},
        ]
        if not muon:
            adamw.append({"params": matrices, "lr": config.lr, "weight_decay": config.weight_decay})
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [group for group in adamw if group["params"]],
                betas=(config.beta1, config.beta2),
                eps=config.eps,
                fused=True,
            )
        ]
        if muon:
            self.optimizers.append(Muon(matrices, lr=config.lr, weight_decay=config.weight_decay))
        self._peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]

    def schedule(self, step: int, steps: int) -> float:
        """Set rates and momentum for `step` (0-based) of `steps`; returns the rate of `optim.lr`."""
        factor = lr_factor(self.config, step, steps)
        for optimizer, peaks in zip(self.optimizers, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
                if isinstance(optimizer, Muon):
                    group["momentum"] = momentum(self.config, step)
        return self.config.lr * factor

    def step(self, ok: Tensor | None = None) -> None:
        """Update every parameter from its gradient, then forget the gradients.

        Where `ok`, a 0-d bool on the device, is false, neither weights nor state move, and the host need not know.
        """
        if ok is not None and ok.device.type not in ("cpu", "cuda") and not ok.item():
            self.zero_grad()  # Apple's GPU: its fused AdamW knows no found_inf, so there the host waits to hear it
            return
        for optimizer in self.optimizers:
            if isinstance(optimizer, Muon):
                optimizer.step(ok=ok)
            else:
                optimizer.found_inf = None if ok is None else (~ok).float()  # type: ignore[attr-defined]
                optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """See checkpoint.Stateful; named `optimizer.parameter.what`. Rates follow from the step and are not in it."""
        return {
            f"{i}.{parameter}.{what}": value
            for i, optimizer in enumerate(self.optimizers)
            for parameter, state in optimizer.state_dict()["state"].items()
            for what, value in state.items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """See checkpoint.Stateful."""
        states: list[dict[int, dict[str, Tensor]]] = [{} for _ in self.optimizers]
        for name, value in state.items():
            i, parameter, what = name.split(".")
            states[int(i)].setdefault(int(parameter), {})[what] = value
        for optimizer, own in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict({"state": own, "param_groups": optimizer.state_dict()["param_groups"]})


def _groups(model: Model) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """(matrices of the blocks, embeddings, head, everything else)."""
    matrices, embeddings, head, rest = [], [], [], []
    for name, parameter in model.named_parameters():
        if name.startswith(("embed.", "positions.")):
            embeddings.append(parameter)
        elif name.startswith("head."):
            head.append(parameter)
        elif parameter.dim() == 2:
            matrices.append(parameter)
        else:
            rest.append(parameter)
    return matrices, embeddings, head, rest


def _has_muon(config: OptimConfig) -> bool:
    match config.name:
        case "muon":
            return True
        case "adamw":
            return False
        case _:
            assert_never(config.name)


def _decay_everywhere(config: OptimConfig) -> float:
    """The weight decay of what is no matrix."""
    match config.decay:
        case "matrices":
            return 0.0
        case "all":
            return config.weight_decay
        case _:
            assert_never(config.decay)
