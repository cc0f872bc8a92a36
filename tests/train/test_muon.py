"""Our Muon is torch's, and can be called off."""

import pytest
import torch
from torch import nn

from train.optim import muon
from train.optim.muon import Muon, orthogonalize

SHAPES = [(32, 32), (32, 32), (96, 32), (32, 96), (96, 32), (48, 16), (32, 32)]


def matrices() -> list[nn.Parameter]:
    numbers = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=numbers)) for shape in SHAPES]


def give_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    numbers = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=numbers)


@pytest.mark.parametrize(("precision", "tolerance"), [(torch.bfloat16, 2e-3), (torch.float32, 1e-2)], ids=str)
def test_it_is_torchs(monkeypatch: pytest.MonkeyPatch, precision: torch.dtype, tolerance: float) -> None:
    """Tall, wide and square, with another momentum and rate at each step; ten steps of 0.02 move a weight by 0.03."""
    monkeypatch.setattr(muon, "_precision", lambda device: precision)
    ours, theirs = matrices(), matrices()
    before = [parameter.detach().clone() for parameter in ours]
    optimizers = Muon(ours, lr=0.02, weight_decay=0.05), torch.optim.Muon(theirs, lr=0.02, weight_decay=0.05)
    for step in range(10):
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            give_gradients(parameters, step)
            optimizer.param_groups[0]["momentum"] = 0.85 + 0.01 * step
            optimizer.param_groups[0]["lr"] = 0.02 + 0.001 * step
            optimizer.step()
    for a, b, start in zip(ours, theirs, before, strict=True):
        moved = (b - start).norm()
        assert moved > 0.5
        assert (a - b).norm() < tolerance * 10 * moved
        mine, its = (optimizer.state[p]["momentum_buffer"] for optimizer, p in zip(optimizers, (a, b), strict=True))
        assert torch.allclose(mine, its, atol=1e-6)


def test_without_the_device_saying_so_it_is_the_same() -> None:
    told, untold = matrices(), matrices()
    for parameters, ok in ((told, torch.tensor(True)), (untold, None)):
        optimizer = Muon(parameters, lr=0.02, weight_decay=0.05)
        for step in range(3):
            give_gradients(parameters, step)
            optimizer.step(ok=ok)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(told, untold, strict=True))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("first", [True, False])
def test_a_step_called_off_moves_nothing(poison: float, first: bool) -> None:
    parameters = matrices()
    optimizer = Muon(parameters, lr=0.02, weight_decay=0.05)
    if not first:
        give_gradients(parameters, 0)
        optimizer.step()
    weights = [parameter.detach().clone() for parameter in parameters]
    momenta = [optimizer.state[p].get("momentum_buffer", torch.zeros_like(p)).clone() for p in parameters]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, poison)
    optimizer.step(ok=torch.tensor(False))
    assert all(torch.equal(p, w) for p, w in zip(parameters, weights, strict=True))
    assert all(torch.equal(optimizer.state[p]["momentum_buffer"], m) for p, m in zip(parameters, momenta, strict=True))


@pytest.mark.parametrize("shape", [(16, 16), (16, 64), (64, 16)])
def test_the_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    found = orthogonalize(torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)))
    values = torch.linalg.svdvals(found.float())
    assert found.shape == (3, *shape)
    assert values.min() > 0.3 and values.max() < 1.3


def test_a_matrix_without_a_gradient_stays() -> None:
    parameters = matrices()
    optimizer = Muon(parameters, lr=0.02, weight_decay=0.05)
    give_gradients(parameters[1:], 0)
    before = parameters[0].detach().clone()
    optimizer.step()
    assert torch.equal(parameters[0], before)
    assert set(optimizer.state_dict()["state"]) == {1, 2, 3, 4, 5, 6}
