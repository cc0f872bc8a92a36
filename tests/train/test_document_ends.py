"""With document masks a document is read as if it stood alone, whatever lies around it in the window."""

from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shards import TokenFolder
from train.config import ModelConfig, OptimConfig
from train.data.batch import Batch
from train.data.document_ends import ends_of, of_rows
from train.data.windows import FolderWindows
from train.evaluate import evaluate
from train.machine.compile import compile_model
from train.model import attention
from train.model.attention import attend, attended
from train.model.gpt import Model
from train.optim.groups import Optimizers
from train.step import Stepper

VOCAB, T = 100, 24
STARTS = [5, 6, 20, T + 11, 2 * T + 1, 2 * T + 23]  # in a batch of four, whose last row is one document
ENDS = [0, 5, 6, 20, T, T + 11, 2 * T, 2 * T + 1, 2 * T + 23, 3 * T, 4 * T]


def model_of(family: str, **settings: Any) -> Model:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "d_model": 32, "seq_len": T}
    model = Model(ModelConfig(family=family, **sizes, **settings), VOCAB)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def batch() -> Batch:
    ids = torch.randint(0, VOCAB, (4, T + 1), generator=torch.Generator().manual_seed(1))
    return Batch(ids[:, :-1], ids[:, 1:], torch.from_numpy(ends_of(np.array(STARTS), 4, T)))


def alone(model: Model, ids: Tensor, place: int) -> Tensor:
    """The logits of one document by itself, learned positions being those that it has in its window."""
    if model.positions is None:
        return model(ids[None])[0]
    shifted = {"positions.weight": model.positions.weight.roll(-place, 0)}
    return torch.func.functional_call(model, shifted, (ids[None],))[0]


@pytest.mark.parametrize("family", ["modern", "gpt2"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_each_document_is_read_as_if_it_stood_alone(family: str, checkpointed: bool) -> None:
    model, (inputs, targets, documents) = model_of(family), batch()
    model.checkpoint_activations = checkpointed
    model.loss(inputs, targets, documents).backward()
    found = [parameter.grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    flat, losses = inputs.flatten(), []
    together = model(inputs, documents).flatten(0, 1)
    for first, last in pairwise(ENDS):
        logits = alone(model, flat[first:last], first % T)
        assert torch.allclose(together[first:last], logits, atol=1e-5)
        losses.append(F.cross_entropy(logits, targets.flatten()[first:last], reduction="sum"))
    (torch.stack(losses).sum() / len(flat)).backward()
    for ours, parameter in zip(found, model.parameters(), strict=True):
        assert ours is not None and parameter.grad is not None
        assert torch.allclose(ours, parameter.grad, atol=1e-6)


@pytest.mark.parametrize("family", ["modern", "gpt2"])
def test_nothing_crosses_the_end_of_a_document(family: str) -> None:
    model, (inputs, _, documents) = model_of(family), batch()
    changed = inputs.clone()
    changed[0, 3] = (changed[0, 3] + 1) % VOCAB
    with torch.no_grad():
        masked, other = model(inputs, documents), model(changed, documents)
        assert not torch.allclose(masked[0, 3:5], other[0, 3:5], atol=1e-3)
        assert torch.equal(masked[0, 5:], other[0, 5:]) and torch.equal(masked[1:], other[1:])
        assert not torch.allclose(model(inputs)[0, 5:], model(changed)[0, 5:], atol=1e-3)


def test_a_window_of_one_document_is_read_as_ever() -> None:
    model, (inputs, targets, _) = model_of("modern"), batch()
    whole = torch.from_numpy(ends_of(np.empty(0, np.int64), 4, T))
    assert whole.tolist() == [0, T, 2 * T, 3 * T] + [4 * T] * 29
    assert torch.allclose(model.loss(inputs, targets, whole), model.loss(inputs, targets), atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.lists(st.integers(1, 9), max_size=6), min_size=1, max_size=6),
    count=st.integers(1, 6),
    data=st.data(),
)
def test_rows_of_a_batch_keep_their_documents(rows: list[list[int]], count: int, data: st.DataObject) -> None:
    count = min(count, len(rows))
    first = data.draw(st.integers(0, len(rows) - count))
    starts = np.array([10 * row + place for row, places in enumerate(rows) for place in places], np.int64)
    found = of_rows(torch.from_numpy(ends_of(starts, len(rows), 10)), first, count, 10)
    inside = starts[(starts >= 10 * first) & (starts < 10 * (first + count))] - 10 * first
    assert found.dtype == torch.int32
    assert np.array_equal(found.unique().numpy(), np.unique(ends_of(inside, count, 10)))
    assert torch.equal(found, found.sort().values)
    assert torch.equal(
        attended(found, count, 10, 8, 0.0), attended(torch.from_numpy(ends_of(inside, count, 10)), count, 10, 8, 0.0)
    )


class Once:
    """One batch."""

    def next(self) -> Batch:
        return batch()


def test_memory_that_runs_out_leaves_the_masks_where_they_were() -> None:
    steps = []
    for pieces in (1, 2, 4):
        model = model_of("modern")
        stepper = Stepper(model, Optimizers(model, OptimConfig()), 1.0, nullcontext)
        stepper.pieces = pieces
        steps.append(stepper.step(Once()))
    for step in steps[1:]:
        assert step.loss.item() == pytest.approx(steps[0].loss.item(), abs=1e-6)
        assert step.grad_norm.item() == pytest.approx(steps[0].grad_norm.item(), rel=1e-5)


def in_pieces(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, same: Tensor, longest: int, other: int) -> Tensor:
    """What varlen_attn says that it computes, on (B * T, H, K): it itself runs on a card alone (tests/gpu)."""
    assert same is ends and longest == other == T and q.dtype == k.dtype == v.dtype
    found = torch.zeros_like(v)
    for first, last in pairwise(ends.tolist()):
        if first < last:
            piece = [each[first:last].transpose(0, 1) for each in (q, k, v)]
            found[first:last] = F.scaled_dot_product_attention(*piece, is_causal=True).transpose(0, 1)
    return found


def test_both_ways_to_attend_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_VARLEN", in_pieces)
    documents = batch().documents
    assert documents is not None
    q, k, v = torch.randn(3, 4, 2, T, 8, generator=torch.Generator().manual_seed(0)).unbind()
    mask = attended(documents, 4, T, 8, 0.0)
    assert (mask.shape, mask.dtype) == ((4, 1, T, T), torch.bool)
    assert torch.allclose(attend(q, k, v, mask), attend(q, k, v, documents), atol=1e-6)


def test_torch_has_the_attention_that_looks_back_only() -> None:
    assert attention._VARLEN is not None
    assert attention._VARLEN.keywords in ({"window_size": (-1, 0)}, {"is_causal": True})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
def test_compiled_it_is_the_same_model() -> None:
    torch.compiler.reset()
    plain, compiled, (inputs, targets, documents) = model_of("modern"), model_of("modern"), batch()
    compile_model(compiled)
    loss = compiled.loss(inputs, targets, documents)
    assert torch.allclose(loss, plain.loss(inputs, targets, documents), atol=1e-5)
    assert compiled.compiled_hidden.is_compiled


def test_evaluation_has_the_same_masks(tiny_folder: Path) -> None:
    torch.manual_seed(0)
    model, folder = Model(ModelConfig(n_layer=1, n_head=2, d_model=32, seq_len=64), 512), TokenFolder(tiny_folder)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    windows = FolderWindows.of(folder, "val", 64, 0, "sequential")
    nats = []
    for i in range(20):
        ids = torch.from_numpy(folder.stream("val").window(i * 64, 65).astype(np.int64))
        starts = sorted({0, 64, *torch.nonzero(ids[:64] == folder.tokenizer.eot)[:, 0].tolist()})
        for first, last in pairwise(starts):
            with torch.no_grad():
                logits = model(ids[None, first:last])[0]
            nats.append(F.cross_entropy(logits, ids[first + 1 : last + 1], reduction="sum"))
    lengths = folder.tokenizer.byte_lengths
    found = evaluate(model, windows, lengths, 20 * 64, 7, nullcontext, document_mask=True)
    assert found.loss == pytest.approx(torch.stack(nats).sum().item() / (20 * 64), abs=1e-5)
    assert abs(evaluate(model, windows, lengths, 20 * 64, 7, nullcontext).loss - found.loss) > 1e-3
