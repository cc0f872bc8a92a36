"""Without a GPU: nothing inside a step asks for a number that only the device has."""

from collections.abc import Callable

import pytest
import torch
from steps import CONFIG, stepper
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from train.config import ModelConfig, OptimConfig
from train.data.batch import Batch
from train.data.document_ends import of_rows
from train.state.guard import Guard
from train.step import StepResult

CPU = torch.device("cpu")


class Empty:
    """Batches of tokens without values."""

    def next(self) -> Batch:
        ids = torch.empty(4, CONFIG.seq_len + 1, dtype=torch.int64)
        return Batch(ids[:, :-1], ids[:, 1:])


def step(family: str, name: str, scaler: torch.amp.GradScaler | None, also: Callable[[StepResult], object]) -> None:
    """Two steps in which no tensor has values: .item(), bool() and nonzero() of one raise."""
    with FakeTensorMode():
        config = ModelConfig(family=family, n_layer=2, n_head=2, d_model=32, seq_len=CONFIG.seq_len)
        ours = stepper(OptimConfig(name=name), config, scaler=scaler, guard=Guard(CPU, 9.0))
        ours.autocast = lambda: torch.autocast("cpu", torch.bfloat16)
        for number in range(2):
            ours.optimizers.schedule(number, 10)
            result = ours.step(Empty(), 2)
        also(result)


@pytest.mark.parametrize("family", ["gpt2", "modern"])
@pytest.mark.parametrize("name", ["muon", "adamw"])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
def test_a_step_asks_for_no_number(family: str, name: str, scaled: bool) -> None:
    step(family, name, torch.amp.GradScaler("cpu") if scaled else None, lambda result: None)


def test_a_question_would_be_heard() -> None:
    with pytest.raises(DataDependentOutputException):
        step("modern", "muon", None, lambda result: result.loss.item())


def test_a_batch_with_documents_is_cut_without_a_question() -> None:
    with FakeTensorMode():
        assert of_rows(torch.empty(17, dtype=torch.int32), 2, 2, CONFIG.seq_len).shape == (17,)
