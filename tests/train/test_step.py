"""A step is the same whatever it is cut into, whatever runs out, and whichever way it is computed."""

from collections.abc import Callable

import pytest
import torch
from harness import complains
from steps import Fixed, stepper, weights
from torch import Tensor

from shards import HostError
from train.config import ModelConfig, OptimConfig
from train.machine.compile import compile_model
from train.model.gpt import Model
from train.state.checkpoint import gather, scatter
from train.step import Stepper, StepResult


def learn(of: Stepper, loader: Fixed, steps: int, accumulation: int = 1) -> list[StepResult]:
    results = []
    for step in range(steps):
        of.optimizers.schedule(step + 30, 100)
        results.append(of.step(loader, accumulation))
    return results


def assert_same(ours: list[StepResult], theirs: list[StepResult]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.loss.item() == pytest.approx(b.loss.item(), abs=1e-5)
        assert a.grad_norm.item() == pytest.approx(b.grad_norm.item(), rel=1e-4)


def test_accumulation_is_one_batch() -> None:
    """1 x 4 sequences and 4 x 1 give the same weights, up to the order of the sums."""
    one, four = stepper(), stepper()
    assert_same(learn(one, Fixed(4), 2), learn(four, Fixed(1), 2, accumulation=4))
    assert torch.allclose(weights(one), weights(four), atol=1e-5)


def out_of_memory_at(
    of: Stepper,
    monkeypatch: pytest.MonkeyPatch,
    fails: Callable[[int, int], bool],
    error: Exception = torch.OutOfMemoryError("CUDA out of memory"),  # noqa: B008
) -> list[int]:
    """The model runs out of memory, halfway through its backward pass, where `fails(call, sequences)`."""
    sizes: list[int] = []
    whole = of.model.loss

    def loss(inputs: Tensor, *rest: Tensor | None) -> Tensor:
        sizes.append(len(inputs))
        found = whole(inputs, *rest)
        if fails(len(sizes), len(inputs)):
            found.backward()  # gradients that a pass which breaks off leaves behind
            raise error
        return found

    monkeypatch.setattr(of.model, "loss", loss)
    return sizes


def test_memory_that_runs_out_changes_the_micro_batch_and_not_the_step(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the third of four micro-batches of six; then again in a micro-batch of three, which one divides."""
    calm, shaken = stepper(), stepper()
    sizes = out_of_memory_at(shaken, monkeypatch, lambda call, size: call == 3 or (call == 8 and size == 3))
    expected, loader = learn(calm, Fixed(6), 2, accumulation=4), Fixed(6)
    assert_same(learn(shaken, loader, 2, accumulation=4), expected)
    assert torch.allclose(weights(calm), weights(shaken), atol=1e-5)
    assert sizes == [6] * 3 + [3] * 5 + [1] * 48
    assert loader.at == 48
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory with 6 sequences at once: continuing with 3 at once, and as many in a step as before",
        "out of memory with 3 sequences at once: continuing with 1 at once, and as many in a step as before",
    ]


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: out of memory"),  # a kernel that is loaded on a full GPU
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB). Tried to allocate 2 GB on private pool."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_runs_out_under_other_names(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    ours = stepper()
    sizes = out_of_memory_at(ours, monkeypatch, lambda call, size: call == 1, error)
    ours.step(Fixed(4))
    assert sizes == [4, 2, 2]


def test_another_fault_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = stepper()
    fault = torch.AcceleratorError("CUDA error: device-side assert triggered")
    sizes = out_of_memory_at(ours, monkeypatch, lambda call, size: True, fault)
    with pytest.raises(torch.AcceleratorError):
        ours.step(Fixed(4))
    assert sizes == [4]


def test_not_even_one_sequence_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = stepper()
    sizes = out_of_memory_at(ours, monkeypatch, lambda call, size: True)
    with complains(HostError, "16 tokens") as caught:
        ours.step(Fixed(4), 2)
    assert "train.checkpoint_activations=true" in caught.value.fix
    assert sizes == [4, 2, 1]


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_an_overflow_skips_the_whole_step(name: str) -> None:
    """One gradient of one table overflows: no optimizer moves, the scale is halved, and it is counted."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    ours = stepper(OptimConfig(name=name, lr=1e-3), scaler=scaler)
    loader = Fixed(4)
    learn(ours, loader, 1)
    before, state = weights(ours), {key: value.clone() for key, value in ours.optimizers.state().items()}
    hook = ours.model.embed.weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([3]), torch.inf))
    result = ours.step(loader)
    hook.remove()
    assert torch.equal(weights(ours), before)
    assert all(torch.equal(value, state[key]) for key, value in ours.optimizers.state().items())
    assert result.grad_norm == 0 and result.loss.isfinite()
    assert ours.counts() == {"skipped_steps": 1, "skipped_spikes": 0, "loss_scale": 512.0}
    assert ours.guard.in_a_row() == 0
    assert all(parameter.grad is None for parameter in ours.model.parameters())
    learn(ours, loader, 1)
    assert not torch.equal(weights(ours), before)
    assert ours.counts()["skipped_steps"] == 1


def test_a_scaled_step_is_the_plain_one() -> None:
    plain, scaled = stepper(), stepper(scaler=torch.amp.GradScaler("cpu", init_scale=4096.0))
    assert_same(learn(plain, Fixed(4), 3), learn(scaled, Fixed(4), 3))
    assert torch.allclose(weights(plain), weights(scaled), atol=1e-5)


def test_the_scaler_comes_back() -> None:
    before = stepper(scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    hook = before.model.embed.weight.register_hook(lambda grad: grad * torch.inf)
    learn(before, Fixed(4), 2)
    hook.remove()
    learn(before, Fixed(4), 5)
    after = stepper(scaler=torch.amp.GradScaler("cpu"))
    parts = {"scaler": before, "guard": before.guard}
    saved = {name: value.clone() for name, value in gather(parts).items()}
    scatter(saved, {"guard": after.guard, "scaler": after})
    assert "scaler" in saved
    assert after.counts() == before.counts() == {"skipped_steps": 2, "skipped_spikes": 0, "loss_scale": 256.0}
    assert after.scaler is not None and before.scaler is not None
    assert after.scaler.state_dict() == before.scaler.state_dict()
    assert before.scaler.state_dict()["_growth_tracker"] == 5


def test_an_overflow_is_no_bad_step_until_the_scale_is_gone() -> None:
    """From 8 it is halved three times; then the gradient itself is no number, which is what leads to a rollback."""
    ours = stepper(scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    ours.model.embed.weight.register_hook(lambda grad: grad * torch.inf)
    loader, in_a_row = Fixed(4), []
    for _ in range(5):
        ours.step(loader)
        in_a_row.append(ours.guard.in_a_row())
    assert in_a_row == [0, 0, 0, 1, 2]
    assert ours.counts()["skipped_steps"] == 5


@pytest.mark.parametrize("family", ["gpt2", "modern"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_checkpointed_activations_change_nothing(family: str, dropout: float) -> None:
    torch.manual_seed(0)
    model = Model(ModelConfig(family=family, n_layer=2, n_head=2, d_model=32, seq_len=16, dropout=dropout), 100)
    batch = Fixed(4).next()
    gradients = []
    for model.checkpoint_activations in (False, True):
        torch.manual_seed(1)
        model.loss(batch.inputs, batch.targets).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        model.zero_grad(set_to_none=True)
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_checkpointed_activations_are_computed_again() -> None:
    """Or the option would be no option."""
    ours = stepper()
    calls = []
    ours.model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    ours.learn(Fixed(2).next())
    ours.model.checkpoint_activations = True
    ours.learn(Fixed(2).next())
    assert len(calls) == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
def test_compiled_it_is_the_same_model() -> None:
    plain, compiled = stepper(), stepper()
    names = list(compiled.model.state_dict())
    compile_model(compiled.model)
    assert_same(learn(plain, Fixed(4), 2), learn(compiled, Fixed(4), 2))
    assert torch.allclose(weights(plain), weights(compiled), atol=1e-4)
    assert list(compiled.model.state_dict()) == names
    assert compiled.model.compiled_hidden.is_compiled


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_without_a_compiler_it_is_eager(caplog: pytest.LogCaptureFixture) -> None:
    import torch._inductor.config as inductor

    torch.compiler.reset()
    plain, ours = stepper(), stepper()
    compile_model(ours.model)
    with inductor.patch({"fx_graph_cache": False, "cpp.cxx": (None, "/nonexistent/g++")}):
        assert_same(learn(ours, Fixed(4), 2), learn(plain, Fixed(4), 2))
    assert torch.equal(weights(plain), weights(ours))
    said = [record.getMessage() for record in caplog.records if record.name == "train.machine.compile"]
    assert [message.split("(")[0].split()[-1] for message in said] == ["hidden", "softmax_"]
    assert all("No working C++ compiler found" in message for message in said)
