"""When a run goes back to its newest checkpoint: asked only where the host waits for the device anyway.

A step that was skipped has moved nothing, so a few of them do no harm. Many in a row say that the weights themselves
are bad, or the data is; behind both there is other data.
"""

import logging
from typing import NoReturn

import torch

from shards.errors import RefusedError
from train.config import OptimConfig, TrainConfig
from train.model.gpt import Model
from train.schedule import Ramp
from train.state.checkpoint import Checkpoint
from train.state.guard import Guard

logger = logging.getLogger(__name__)
MOST = 3  # to one checkpoint: what does not get past it then never will


class Rollback:
    """Watches a run's skipped steps and its weights, decides when to roll back, and counts how often it did.

    After `due()`, `saves` says whether this step's checkpoint is to be published: one is due every `checkpoint_every`
    steps and before each evaluation. There is none during a streak of skipped steps; one that is due by then is written
    after the next accepted step.
    """

    def __init__(self, guard: Guard, model: Model, optim: OptimConfig, train: TrainConfig, ramp: Ramp) -> None:
        self._guard, self._model, self._optim, self._train, self._ramp = guard, model, optim, train, ramp
        self.saves = self._owes_save = False
        self._count = 0  # since the newest checkpoint; a run that is killed goes back to it and counts again

    def due(self, step: int, *, stopping: bool) -> str:
        """Why to go back, now that `step` steps are done; empty when there is no reason or no look was due.

        A stop asks only for weights that are fit to be saved.
        """
        train, last = self._train, self._ramp.ends_at(step)
        saves, evaluates = is_due(step, train.checkpoint_every) or self._owes_save, is_due(step, train.eval_every)
        trusts = saves or evaluates or last or stopping
        self.saves = False
        if not (trusts or is_due(step, train.log_every)):
            return ""
        skipped = self._guard.in_a_row()
        if trusts and not self._weights_are_finite():
            return "a weight is not finite"
        if 0 < train.rollback_after <= skipped and not stopping:
            return f"{skipped} steps in a row were skipped: their loss or gradient was non-finite or a spike"
        self.saves, self._owes_save = (saves or evaluates) and not skipped, saves and skipped > 0
        return ""

    @property
    def calm(self) -> bool:
        """Whether the last step was taken: in the middle of skipped ones no evaluation is the best. Waits."""
        return not self._guard.in_a_row()

    def begin(self, step: int, reason: str, saved: Checkpoint | None) -> Checkpoint:
        """Count one more, to `saved`. RefusedError when there were too many, or when there is nothing to go back to."""
        if saved is None or self._count == MOST:
            self.refuse(step, reason)
        self._count, self._owes_save = self._count + 1, False
        return saved

    def refuse(self, step: int, reason: str) -> NoReturn:
        """RefusedError: the run has diverged for good."""
        often = f", {self._count} times after going back to the last checkpoint" if self._count else ""
        raise RefusedError(
            f"step {step}: {reason}{often}",
            "the run has diverged; the checkpoints from before it are valid",
            f"start over with a lower rate, --fresh --set optim.lr={self._optim.lr / 3:.2g}"
            + (", or skip no spikes: --set train.spike_z=0" if self._train.spike_z else ""),
        )

    def saved(self) -> None:
        """There is a new checkpoint to go back to."""
        self._count = 0

    def tell(self, step: int, position: int) -> None:
        """Warn of the steps that were skipped since the last call, and name their windows; `position` is behind them.

        Waits for the device.
        """
        seq_len, done = self._model.config.seq_len, self._ramp.tokens_before(step)
        places = []
        for skipped in self._guard.news():
            first, end = (position - (done - self._ramp.tokens_before(s)) // seq_len for s in (skipped - 1, skipped))
            places.append(f"step {skipped} (windows {first}-{end - 1})")
        if places:
            logger.warning("skipped (non-finite or spike): %s", ", ".join(places))

    def _weights_are_finite(self) -> bool:
        tensors = self._model.state_dict().values()
        return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())


def is_due(step: int, every: int) -> bool:
    """Whether something that is done `every` so many steps, 0 for never, is done after `step` of them."""
    return every > 0 and step % every == 0
