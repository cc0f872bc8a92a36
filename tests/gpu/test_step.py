"""The step on a card: no waiting inside it, the same numbers as on the CPU, memory that runs out, the finder itself."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from train.config import ModelConfig, OptimConfig, TrainConfig
from train.data.batch import Batch
from train.machine.compile import OrEager, compile_model
from train.machine.device import autocast, loss_scaler, resolve_precision
from train.micro_batch import best_fit
from train.model.gpt import Model
from train.model.loss import linear_cross_entropy
from train.optim.groups import Optimizers
from train.state.guard import Guard
from train.step import Stepper

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own, while it compiles
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
CUDA = torch.device("cuda")
CONFIG = ModelConfig(n_layer=2, n_head=2, d_model=128, seq_len=128)
ADAMW = OptimConfig(name="adamw", lr=1e-3, eps=1e-8)


class Fixed:
    """Batches of `size` sequences on `device`, always the same ones in the same order."""

    def __init__(self, size: int, device: torch.device = CUDA) -> None:
        self.size, self.at = size, 0
        ids = torch.randint(0, 1000, (64, CONFIG.seq_len + 1), generator=torch.Generator().manual_seed(0))
        self.ids = ids.to(device)

    def next(self) -> Batch:
        rows = self.ids[self.at : self.at + self.size]
        self.at += self.size
        return Batch(rows[:, :-1], rows[:, 1:])


def stepper(
    device: torch.device,
    precision: torch.dtype,
    *,
    config: ModelConfig = CONFIG,
    optim: OptimConfig = ADAMW,
    compiled: bool = False,
) -> Stepper:
    torch.manual_seed(0)
    model = Model(config, 1000)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.to(device)
    if compiled:
        compile_model(model)

    def context() -> AbstractContextManager[object]:
        return autocast(device, precision)

    optimizers, guard = Optimizers(model, optim), Guard(device, spike_z=6.0, window=2)
    return Stepper(model, optimizers, 1.0, context, loss_scaler(device, precision), guard)


def losses(of: Stepper, loader: Any, steps: int = 4) -> list[float]:
    found = []
    for step in range(steps):
        of.optimizers.schedule(step + 30, 100)
        found.append(of.step(loader, 2).loss)
    return torch.stack(found).tolist()


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16], ids=str)
def test_nothing_waits_for_the_device_inside_a_step(name: str, precision: torch.dtype, compiled: bool) -> None:
    ours = stepper(CUDA, precision, optim=OptimConfig(name=name), compiled=compiled)
    loader = Fixed(2)
    ours.step(loader, 2)
    ours.step(loader, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours.step(loader, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_is_called_off_on_the_device(name: str) -> None:
    """With a gradient that is not a number nothing moves, and nothing waits to hear of it."""
    ours, loader = stepper(CUDA, torch.bfloat16, optim=OptimConfig(name=name)), Fixed(2)
    ours.step(loader)
    before = [parameter.detach().clone() for parameter in ours.model.parameters()]
    state = {key: value.clone() for key, value in ours.optimizers.state().items()}
    hook = ours.model.embed.weight.register_hook(lambda gradient: gradient * torch.nan)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours.step(loader)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), before, strict=True))
    assert all(torch.equal(value, state[key]) for key, value in ours.optimizers.state().items())
    assert ours.counts() == {"skipped_steps": 1, "skipped_spikes": 0}
    ours.step(loader)
    assert ours.counts()["skipped_steps"] == 1


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("precision", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 3e-2), (torch.float16, 1e-2)], ids=str
)
def test_the_losses_are_those_of_the_cpu(precision: torch.dtype, tolerance: float, compiled: bool) -> None:
    if precision is torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("a card from before Ampere")
    ours = stepper(CUDA, precision, compiled=compiled)
    if ours.scaler is not None:
        ours.scaler.load_state_dict({**ours.scaler.state_dict(), "scale": 1024.0})  # no overflow on the way
    found = losses(ours, Fixed(4))
    assert found == pytest.approx(
        losses(stepper(torch.device("cpu"), torch.float32), Fixed(4, torch.device("cpu"))), abs=tolerance
    )
    if compiled:
        assert isinstance(ours.model.compiled_hidden, OrEager) and ours.model.compiled_hidden.is_compiled


def test_the_loss_is_the_plain_one() -> None:
    hidden = torch.randn(3000, 64, device=CUDA, requires_grad=True)
    weight = torch.randn(50304, 64, device=CUDA, requires_grad=True)
    targets = torch.randint(50257, (3000,), device=CUDA)
    ours = linear_cross_entropy(hidden, weight, targets, 50257)
    theirs = F.cross_entropy(F.linear(hidden, weight)[:, :50257], targets)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    for a, b in zip(
        torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(theirs, (hidden, weight)), strict=True
    ):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_attention_is_flash() -> None:
    if resolve_precision(TrainConfig(), CUDA) is not torch.bfloat16:
        pytest.skip("a card from before Ampere")
    ours = stepper(CUDA, torch.bfloat16)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):  # raises where it cannot be used
        ours.step(Fixed(2), 2)


def test_memory_that_really_runs_out() -> None:
    """The process may have as much as half the batch needs; the step is done, and nothing else is."""
    wide = msgspec.structs.replace(CONFIG, n_layer=8, d_model=512)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    calm = stepper(CUDA, torch.float32, config=wide)
    calm.step(Fixed(16))
    expected = calm.step(Fixed(32)).loss.item()
    whole = torch.cuda.max_memory_allocated()
    shaken = stepper(CUDA, torch.float32, config=wide)
    shaken.step(Fixed(16))
    del calm
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.set_per_process_memory_fraction(0.85 * whole / total)
    try:
        found = shaken.step(Fixed(32)).loss.item()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert shaken.pieces > 1
    assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("compiled", ["off", "on"])
def test_the_finder_finds_and_remembers(tmp_path: Path, caplog: pytest.LogCaptureFixture, compiled: str) -> None:
    caplog.set_level("INFO", "train.micro_batch")
    train = TrainConfig(steps=1, batch_tokens=CONFIG.seq_len * 32, compile=compiled)
    cache = tmp_path / "cache" / "fits.json"
    fit = best_fit(CONFIG, ADAMW, train, 1000, CUDA, cache)
    assert 32 % fit.micro_batch == 0 and fit.micro_batch in fit.rates and fit.eval_batch in fit.eval_rates
    said = [record.getMessage() for record in caplog.records]
    assert said[0].startswith("finding the micro-batch for this GPU and model")
    assert sum(line.startswith("training with ") for line in said) >= 2
    assert best_fit(CONFIG, ADAMW, train, 1000, CUDA, cache) == fit
    assert len(caplog.records) == len(said)


def test_without_autocast_nothing_is_scaled() -> None:
    assert isinstance(autocast(CUDA, torch.float32), nullcontext)
    assert loss_scaler(CUDA, torch.bfloat16) is None
