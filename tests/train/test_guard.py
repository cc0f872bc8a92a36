"""Which steps count: nothing that is no number, no spike, and whatever lasts."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from steps import Fixed, stepper, weights

from train.config import ModelConfig, OptimConfig
from train.data.batch import Batch
from train.state.guard import RECENT, Guard
from train.step import Stepper

CPU = torch.device("cpu")
TINY = ModelConfig(n_layer=1, n_head=2, d_model=16, seq_len=16)


def judged(guard: Guard, loss: float, norm: float = 1.0) -> bool:
    return bool(guard.judge(torch.tensor(loss), torch.tensor(norm)))


def wavering(steps: int, level: float = 4.0) -> list[float]:
    return (level + 0.1 * torch.randn(steps, generator=torch.Generator().manual_seed(0))).tolist()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_no_number_is_skipped(value: float, place: int) -> None:
    guard = Guard(CPU)
    assert judged(guard, 4.0)
    assert not judged(guard, *([value, 1.0] if place == 0 else [4.0, value]))
    assert guard.in_a_row() == 1
    assert guard.counts() == {"skipped_steps": 1, "skipped_spikes": 0}
    assert guard.news() == [2] and guard.news() == []
    assert judged(guard, 2.0)
    assert guard.in_a_row() == 0
    assert guard.mean_loss() == 3.0
    assert guard.mean_loss() is None


@pytest.mark.parametrize("value", [400.0, 4e30])
@pytest.mark.parametrize("place", [0, 1])
def test_a_spike_is_skipped_once_the_window_is_full(value: float, place: int) -> None:
    def guarded(spike: bool, guard: Guard, usual: float) -> bool:
        return judged(guard, *((value, usual) if place == 0 else (usual, value)) if spike else (usual, usual))

    guard = Guard(CPU, spike_z=6.0, window=32)
    usual = wavering(300)
    assert guarded(True, guard, 4.0)
    assert all(guarded(False, guard, each) for each in usual[:32])
    assert not guarded(True, guard, 4.0)
    assert guard.counts() == {"skipped_steps": 1, "skipped_spikes": 1}
    assert all(guarded(False, guard, each) for each in usual[32:])
    assert not guarded(True, guard, 4.0)
    assert guard.counts() == {"skipped_steps": 2, "skipped_spikes": 2}


def test_what_falls_is_no_spike() -> None:
    guard = Guard(CPU, spike_z=3.0, window=16)
    assert all(judged(guard, each) for each in (*wavering(20)[:16], 0.01, 0.001))


@pytest.mark.parametrize("window", [16, 128])
@pytest.mark.parametrize("spike_z", [3.0, 6.0, 9.0])
def test_a_level_that_lasts_is_accepted(window: int, spike_z: float) -> None:
    guard = Guard(CPU, spike_z, window)
    usual = wavering(2 * window)
    assert all(judged(guard, each) for each in usual)
    taken = [judged(guard, 100 + each) for each in usual]
    skipped = taken.index(True)
    assert 1 <= skipped <= window / (spike_z**2 + 1) + 1
    assert all(taken[skipped:])


def test_off_is_off() -> None:
    guard = Guard(CPU, spike_z=0, window=8)
    assert all(judged(guard, each) for each in (*wavering(8), 1e9, 1e9))


def test_only_the_last_skipped_steps_are_named() -> None:
    guard = Guard(CPU)
    for _ in range(2 * RECENT + 3):
        judged(guard, float("nan"))
    assert guard.news() == list(range(RECENT + 4, 2 * RECENT + 4))
    assert guard.in_a_row() == guard.counts()["skipped_steps"] == 2 * RECENT + 3
    guard.forgive()
    assert guard.in_a_row() == 0 and guard.counts()["skipped_steps"] == 2 * RECENT + 3


def test_its_state_comes_back() -> None:
    values = [(each, abs(other)) for each, other in pairwise(wavering(60))]
    values[30], values[45], values[50] = (float("nan"), 1.0), (400.0, 1.0), (4.0, float("inf"))
    straight, first, second = (Guard(CPU, spike_z=5.0, window=16) for _ in range(3))
    expected = [judged(straight, *each) for each in values]
    found = [judged(first, *each) for each in values[:47]]
    tensors = {name: value.clone() for name, value in first.state().items()}
    second.load_state(tensors)
    found += [judged(second, *each) for each in values[47:]]
    assert found == expected and expected.count(False) == 3
    assert all(torch.equal(value, straight.state()[name]) for name, value in second.state().items())
    assert second.news() == [51]


def tiny(name: str, **settings: Any) -> Stepper:
    return stepper(OptimConfig(name=name, lr=0.01, warmup_steps=2), TINY, **settings)


class Around(Fixed):
    """The same 16 batches of two, again and again."""

    def next(self) -> Batch:
        self.at %= 32
        return super().next()


def taken(of: Stepper, loader: Around, step: int) -> None:
    of.optimizers.schedule(step, 400)
    of.step(loader)


@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_not_a_number_at_any_step_is_as_if_its_batch_were_not_there(name: str, place: str) -> None:
    """Before each of 50 steps one goes wrong, and the end is that of the 50 alone."""
    ours, theirs, loader, undisturbed = tiny(name), tiny(name), Around(2), Around(2)
    for step in range(50):
        poison = torch.nan if step % 2 else torch.inf
        hooked = ours.model.norm if place == "loss" else ours.model.embed
        if place == "loss":
            hook = hooked.register_forward_hook(lambda *call, poison=poison: call[-1] * poison)
        else:
            hook = hooked.weight.register_hook(lambda gradient, poison=poison: gradient * poison)
        taken(ours, loader, step)
        hook.remove()
        assert ours.counts() == {"skipped_steps": step + 1, "skipped_spikes": 0}
        loader.at = undisturbed.at
        taken(ours, loader, step)
        taken(theirs, undisturbed, step)
        assert torch.equal(weights(ours), weights(theirs)), step
    expected = theirs.optimizers.state()
    assert all(torch.equal(value, expected[key]) for key, value in ours.optimizers.state().items())


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_spike_at_step_200_is_skipped(name: str) -> None:
    """A loss a thousand times as high, with the gradient that belongs to it."""
    ours, loader = tiny(name, guard=Guard(CPU, spike_z=9.0, window=32)), Around(2)
    whole = ours.model.loss
    for step in range(199):
        taken(ours, loader, step)
    before = weights(ours)
    ours.model.loss = lambda *batch: 1000 * whole(*batch)  # type: ignore[method-assign]
    taken(ours, loader, 199)
    ours.model.loss = whole  # type: ignore[method-assign]
    assert torch.equal(weights(ours), before)
    taken(ours, loader, 199)
    assert not torch.equal(weights(ours), before)
    assert ours.counts() == {"skipped_steps": 1, "skipped_spikes": 1}
    assert ours.guard.news() == [200]
