"""The chunked loss is the plain one, in value and gradients, and holds no more than a chunk of logits."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from train.model import loss as chunked
from train.model.loss import linear_cross_entropy

VOCAB, PADDED, WIDTH = 321, 384, 24


@pytest.fixture(params=[1, 7, 10_000], ids="{} rows a chunk".format)
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setitem(chunked.CHUNK_BYTES, "cpu", request.param * PADDED * 4)
    return int(request.param)


def inputs(scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = (scale * torch.randn(50, WIDTH, generator=generator)).requires_grad_()
    weight = torch.randn(PADDED, WIDTH, generator=generator).requires_grad_()
    return hidden, weight, torch.randint(VOCAB, (50,), generator=generator)


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight)[:, :VOCAB].float(), targets)


def results(loss: Tensor, hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return loss, *torch.autograd.grad(loss * 3, (hidden, weight))


@pytest.mark.parametrize("scale", [1.0, 100.0], ids=["", "large logits"])
def test_it_is_the_plain_one(rows: int, scale: float) -> None:
    hidden, weight, targets = inputs(scale)
    ours = results(linear_cross_entropy(hidden, weight, targets, VOCAB), hidden, weight)
    theirs = results(plain(hidden, weight, targets), hidden, weight)
    assert ours[0].dtype == torch.float32
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5 * scale)
    assert not ours[2][VOCAB:].any()


def test_in_bf16_it_is_as_near_to_the_truth_as_the_plain_one(rows: int) -> None:
    hidden, weight, targets = inputs()
    truth = results(plain(hidden, weight, targets), hidden, weight)
    with torch.autocast("cpu", torch.bfloat16):
        ours = results(linear_cross_entropy(hidden, weight, targets, VOCAB), hidden, weight)
        theirs = results(plain(hidden, weight, targets), hidden, weight)
    for a, b, true in zip(ours, theirs, truth, strict=True):
        assert a.dtype == torch.float32
        assert (a - true).norm() <= 1.2 * (b - true).norm() + 1e-3 * true.norm()


def test_nothing_is_learned_under_no_grad(rows: int) -> None:
    hidden, weight, targets = inputs()
    with torch.no_grad():
        found = linear_cross_entropy(hidden, weight, targets, VOCAB)
    assert not found.requires_grad
    assert found.item() == pytest.approx(plain(hidden, weight, targets).item(), abs=1e-5)


def test_a_second_backward_is_refused() -> None:
    """The gradients are scaled where they lie: twice would be silently wrong."""
    hidden, weight, targets = inputs()
    found = linear_cross_entropy(hidden, weight, targets, VOCAB)
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.backward()


PEAK = """
import resource, torch
from train.model.loss import linear_cross_entropy
torch.set_num_threads(1)
hidden, weight = torch.randn(8192, 16, requires_grad=True), torch.randn(32768, 16, requires_grad=True)
targets = torch.randint(32768, (8192,))
linear_cross_entropy(hidden[:64], weight, targets[:64], 32768).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
linear_cross_entropy(hidden, weight, targets, 32768).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_the_logits_are_never_all_there() -> None:
    """They would be 1 GiB; a chunk is 128 MiB."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 384 << 10
