"""What is compiled: how often in a whole run, and what happens where the compiler fails. No GPU is needed."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import rank_work
import torch
from harness import results
from steps import Fixed, stepper, weights
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.graph import GraphLowering
from training import trained

from train.config import TrainConfig
from train.events import Ended, Event
from train.job import Job
from train.machine.compile import OrEager, compile_model, wants_compile
from train.model.gpt import Model

pytestmark = [  # torch's own, while it compiles
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
ONCE = ["backward", "forward", "inference", "softmax"]  # the layers in training and in evaluation; a chunk of the loss


class Counting:
    """A backend that compiles nothing and remembers what it was asked to."""

    def __init__(self) -> None:
        self.kinds: list[str] = []

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        def compiled(kind: str, graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
            self.kinds.append("softmax" if len(inputs) == 1 else kind)
            return make_boxed_func(graph.forward)  # type: ignore[no-any-return]

        kinds = {"fw_compiler": "forward", "bw_compiler": "backward", "inference_compiler": "inference"}
        return aot_autograd(**{name: partial(compiled, kind) for name, kind in kinds.items()})(module, inputs)  # type: ignore[no-any-return]


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counting]:
    backend = Counting()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    yield backend
    torch.compiler.reset()


def run(job: Job) -> Ended:
    """The run's last event, after all of it."""
    events: list[Event] = []
    trained(job, events.append)
    end = events[-1]
    assert isinstance(end, Ended)
    return end


@pytest.mark.parametrize("mask", [False, True], ids=["", "documents"])
def test_a_whole_run_compiles_each_graph_once(
    tiny_folder: Path, tmp_path: Path, counting: Counting, mask: bool
) -> None:
    """40 steps with a ramp, evaluations and samples; document masks of many different numbers of documents."""
    wanted = {"micro_batch": 4, "batch_ramp": (128,), "document_mask": mask}
    compiled = rank_work.job(tiny_folder, tmp_path / "compiled", compile="on", **wanted)
    end = run(compiled)
    assert sorted(counting.kinds) == ONCE
    assert end.graphs == 3  # a backward graph counts with its forward graph
    plain = rank_work.job(tiny_folder, tmp_path / "plain", compile="off", **wanted)
    assert run(plain).graphs == 0
    assert len(counting.kinds) == len(ONCE)
    for a, b in zip(results(compiled.metrics), results(plain.metrics), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.slow
def test_a_smaller_micro_batch_compiles_once_more(counting: Counting) -> None:
    """What a run that is out of memory costs."""
    ours = stepper()
    compile_model(ours.model)
    ours.step(Fixed(4))
    before = len(counting.kinds)
    ours.pieces = 2
    ours.step(Fixed(4))
    ours.step(Fixed(4))
    assert sorted(counting.kinds[before:]) == ["backward", "forward", "softmax"]


@pytest.mark.slow
def test_a_backward_graph_that_cannot_be_compiled_is_eager(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As ptxas refuses a kernel on an unusual GPU: known before the first backward pass, and not in it."""
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor

    lower = GraphLowering.codegen

    def refuse(graph: GraphLowering) -> Any:
        if graph.is_backward:
            raise RuntimeError("ptxas fatal: out of resource: shared memory")
        return lower(graph)

    monkeypatch.setattr(GraphLowering, "codegen", refuse)
    plain, ours = stepper(), stepper()
    compile_model(ours.model)
    with inductor.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False):
        found, expected = ([of.step(Fixed(4)).loss.item() for _ in range(3)] for of in (ours, plain))
    assert found == pytest.approx(expected, abs=1e-6)
    assert torch.allclose(weights(ours), weights(plain), atol=1e-5)
    assert isinstance(ours.model.compiled_hidden, OrEager) and not ours.model.compiled_hidden.is_compiled
    (said,) = (record.getMessage() for record in caplog.records if record.name == "train.machine.compile")
    assert "torch.compile failed on hidden()" in said and "shared memory" in said


def test_what_auto_means() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert [wants_compile(TrainConfig(compile=wish), gpu) for wish in ("auto", "on", "off")] == [True, True, False]
    assert [wants_compile(TrainConfig(compile=wish), cpu) for wish in ("auto", "on", "off")] == [False, True, False]
    assert Model.compiled_hidden is None and Model.compiled_softmax is None
