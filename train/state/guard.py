"""Which steps may move the weights, decided on the device: the host asks only where it stops to look anyway."""

from typing import Any

import torch
from torch import Tensor

WINDOW = 128  # values that a spike is measured against, as in llm.c
RECENT = 16  # skipped steps remembered, to be named in a warning
HIGHEST = 1e15  # what enters the window at most: its square must still be finite in fp32


class Guard:
    """Skips steps whose loss or gradient is not finite, or is a spike, and sums up the loss of the others.

    A spike is a loss, or a gradient norm before clipping, more than `spike_z` standard deviations above the mean of the
    last `window` finite ones (0: there are none; llm.c's outlier detector, upwards only). Every finite value enters the
    window, skipped or not, so a lasting change of level is accepted after window / (spike_z^2 + 1) + 1 steps at most.
    """

    def __init__(self, device: torch.device, spike_z: float = 0.0, window: int = WINDOW) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self.spike_z, self.window = spike_z, window
        self._state = {
            "values": torch.zeros(2, window, device=device),  # the last finite losses and norms, a ring
            "entered": zeros(),  # into that ring, ever
            "step": zeros(),
            "skipped": zeros(3),  # not finite, spikes, overflows of a loss that was scaled too high
            "in_a_row": zeros(),  # steps skipped since one was not; overflows are not among them
            "recent": zeros(RECENT),  # their numbers, a ring; steps count from 1
            "loss_sum": torch.zeros((), device=device),  # of the steps since the last log row
            "loss_steps": zeros(),
        }
        self._places = torch.arange(window, device=device)
        self._recent_places = torch.arange(RECENT, device=device)
        self._told = 0

    @torch.no_grad()
    def judge(self, loss: Tensor, norm: Tensor, loss_scale: Tensor | None = None) -> Tensor:
        """Whether the step may be taken: a 0-d bool on the device, from its mean loss and gradient norm, 0-d too.

        `loss_scale` is fp16's: while it is above 1, a finite loss with a gradient that is not has only been scaled too
        high. Nothing here waits for the device.
        """
        state = self._state
        values = torch.stack((loss, norm)).float()
        finite = values.isfinite().all()
        spike = finite & self._is_spike(values)
        ok = finite & ~spike
        overflow = torch.zeros_like(ok) if loss_scale is None else ~finite & loss.isfinite() & (loss_scale > 1)
        bad = ~ok & ~overflow
        here = (self._places == state["entered"] % self.window) & finite
        state["values"].copy_(torch.where(here, values.clamp(max=HIGHEST)[:, None], state["values"]))
        state["entered"] += finite
        state["step"] += 1
        here = (self._recent_places == state["skipped"][:2].sum() % RECENT) & bad
        state["recent"].copy_(torch.where(here, state["step"], state["recent"]))
        state["skipped"] += torch.stack((bad & ~finite, spike, overflow))
        state["in_a_row"].add_(bad).mul_(~ok)
        state["loss_sum"] += loss.masked_fill(~ok, 0.0)
        state["loss_steps"] += ok
        return ok

    def mean_loss(self) -> float | None:
        """The mean loss of the steps taken since the last call; None when all were skipped. Waits for the device."""
        steps = self._state["loss_steps"].item()
        mean = self._state["loss_sum"].item() / steps if steps else None
        self._state["loss_sum"].zero_()
        self._state["loss_steps"].zero_()
        return mean

    def counts(self) -> dict[str, Any]:
        """What a log row says: all steps skipped so far, and how many of them for a spike. Waits for the device."""
        skipped = self._state["skipped"].tolist()
        return {"skipped_steps": sum(skipped), "skipped_spikes": skipped[1]}

    def in_a_row(self) -> int:
        """How many steps up to now were skipped, one after the other. Waits for the device."""
        return int(self._state["in_a_row"].item())

    def news(self) -> list[int]:
        """The steps skipped since the last call, the last 16 of them, from 1 on. Waits for the device."""
        before, self._told = self._told, int(self._state["step"].item())
        return sorted(step for step in self._state["recent"].tolist() if step > before)

    def forgive(self) -> None:
        """Count skipped steps in a row from 0 again."""
        self._state["in_a_row"].zero_()

    def state(self) -> dict[str, Tensor]:
        """See checkpoint.Stateful."""
        return dict(self._state)

    def load_state(self, state: dict[str, Tensor]) -> None:
        """See checkpoint.Stateful."""
        for name, value in self._state.items():
            value.copy_(state[name])
        self._told = int(self._state["step"].item())

    def _is_spike(self, values: Tensor) -> Tensor:
        deviation, mean = torch.std_mean(self._state["values"], dim=1)
        above = (values - mean > self.spike_z * deviation).any()
        return above & (self._state["entered"] >= self.window) & bool(self.spike_z)
