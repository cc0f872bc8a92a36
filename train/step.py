"""One optimizer step: micro-batches forward and backward, clip, judge, update. Nothing here waits for the device.

A step that the guard does not let pass moves nothing. Memory that runs out makes the micro-batches smaller and the step
the same.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol, cast

import torch

from shards.errors import HostError
from train.data.batch import Batch, cut
from train.machine.memory import is_out_of_memory
from train.machine.ranks import World
from train.machine.reducer import Reducer
from train.model.gpt import Model
from train.optim.groups import Optimizers
from train.state.guard import Guard

logger = logging.getLogger(__name__)


class StepResult(NamedTuple):
    """Scalars still on the device: the batch's mean loss in nats per token, the gradient norm before clipping.

    The norm of a step that was skipped is 0: nothing moved.
    """

    loss: torch.Tensor
    grad_norm: torch.Tensor


class Batches(Protocol):
    """What a TokenLoader does for a step."""

    def next(self) -> Batch:
        """The next batch."""


class Stepper:
    """Learns from several batches of the loader as from one batch: their gradients are averaged.

    `scaler`, for fp16, scales the loss. `guard` says which steps are skipped, and counts them: without one of its own,
    those whose loss or gradient is not finite. Every rank of `world` has batches of its own, as many; the loss and the
    gradients are the means of all, the same for all.
    """

    def __init__(
        self,
        model: Model,
        optimizers: Optimizers,
        clip: float,
        autocast: Callable[[], AbstractContextManager[object]],
        scaler: torch.amp.GradScaler | None = None,
        guard: Guard | None = None,
        world: World | None = None,
    ) -> None:
        self.reducer = Reducer(world or World(), model.parameters())
        self.model, self.optimizers = model, optimizers
        self.clip, self.autocast, self.scaler = clip or float("inf"), autocast, scaler
        self.guard = guard or Guard(next(model.parameters()).device)
        self.pieces = 1  # what each of the loader's batches is cut into, since the whole did not fit

    def step(self, loader: Batches, accumulation: int = 1) -> StepResult:
        """Learn from the next `accumulation` batches. HostError when not even one sequence at once fits in memory."""
        total = torch.zeros((), device=next(self.model.parameters()).device)
        batches: list[Batch] = []
        for number in range(1, accumulation + 1):
            batches.append(loader.next())
            waiting = batches[-1:]
            while not self._learned(waiting, total, 1 / accumulation, last=number == accumulation):
                self._cut_smaller(batches[0])
                self.model.zero_grad(set_to_none=True)  # a backward pass that broke off has left some of its gradients
                total.zero_()
                waiting = batches
        self.reducer.finish(total)
        return StepResult(total, self.update(total))

    def learn(self, batch: Batch, share: float = 1.0) -> torch.Tensor:
        """Add the gradients of one micro-batch, which is `share` of a step; returns that share of its mean loss."""
        with self.autocast():
            loss = self.model.loss(batch.inputs, batch.targets, batch.documents) * share
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def update(self, loss: torch.Tensor) -> torch.Tensor:
        """Clip and apply the gradients of a step with this mean `loss`, and forget them; returns their norm before."""
        scale = None
        if self.scaler is not None:
            scale = self.scaler.scale(torch.ones_like(loss))
            self.scaler.unscale_(cast(torch.optim.Optimizer, _Together(self.optimizers)))
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        ok = self.guard.judge(loss, norm, scale)
        self.optimizers.step(ok)
        if self.scaler is not None:
            self.scaler.update()
        return norm.masked_fill(~ok, 0.0)  # not torch.where, which would wait to send the 0

    def counts(self) -> dict[str, Any]:
        """What a log row says of the steps that were skipped, and fp16's scale."""
        scale = {} if self.scaler is None else {"loss_scale": self.scaler.get_scale()}
        return self.guard.counts() | scale

    def state(self) -> dict[str, torch.Tensor]:
        """See checkpoint.Stateful: fp16's scale and how long it has held."""
        if self.scaler is None:
            return {}
        state = self.scaler.state_dict()
        return {"": torch.tensor((state["scale"], state["_growth_tracker"]), dtype=torch.float64)}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """See checkpoint.Stateful."""
        if self.scaler is not None and "" in state:
            scale, growth = state[""].tolist()
            self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": scale, "_growth_tracker": int(growth)})

    def _learned(self, batches: list[Batch], total: torch.Tensor, share: float, *, last: bool) -> bool:
        """Learn from `batches`, each `share` of a step, and add their losses to `total`; `last` ends the step.

        False when memory ran out on the way.
        """
        pieces = [piece for batch in batches for piece in cut(batch, self.pieces)]
        try:
            for number, piece in enumerate(pieces, 1):
                with self.reducer.overlap() if last and number == len(pieces) else nullcontext():
                    total += self.learn(piece, share / self.pieces)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False  # what the broken pass still held is let go with its frames, before the next try
        return True

    def _cut_smaller(self, batch: Batch) -> None:
        sequences, seq_len = batch.inputs.shape
        now = sequences // self.pieces
        if now == 1:
            raise HostError(
                f"out of memory with one sequence of {seq_len:,} tokens at once",
                "a smaller micro-batch does not exist",
                "--set train.checkpoint_activations=true, or a smaller model.seq_len or model.d_model",
            )
        smaller = next(size for size in range(now // 2, 0, -1) if sequences % size == 0)
        self.pieces = sequences // smaller
        if batch.inputs.is_cuda:
            torch.cuda.empty_cache()
        logger.warning(
            "out of memory with %d sequences at once: continuing with %d at once, and as many in a step as before",
            now,
            smaller,
        )


class _Together:
    """All optimizers as the one whose gradients a GradScaler divides: an overflow is one of the whole step."""

    def __init__(self, optimizers: Optimizers) -> None:
        self.param_groups = [group for optimizer in optimizers.optimizers for group in optimizer.param_groups]
