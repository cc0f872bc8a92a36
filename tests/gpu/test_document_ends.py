"""Document masks on a card: variable-length attention gives what the mask gives, forward and backward, in one graph."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from train.config import ModelConfig
from train.data.document_ends import ends_of
from train.machine.compile import OrEager, compile_model
from train.machine.device import autocast
from train.model.attention import attend, attended
from train.model.gpt import Model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own, while it compiles
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
CUDA, B, T = torch.device("cuda"), 4, 256


@pytest.fixture(autouse=True)
def ampere() -> Iterator[None]:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("a card from before Ampere")
    torch.manual_seed(0)
    yield


def ends(seed: int, documents: int = 11) -> Tensor:
    starts = np.random.default_rng(seed).integers(1, B * T, documents)
    return torch.from_numpy(ends_of(starts, B, T)).to(CUDA)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16], ids=str)
def test_variable_length_attention_is_the_mask(precision: torch.dtype) -> None:
    q, k, v = (torch.randn(B, 2, T, 64, device=CUDA, dtype=precision, requires_grad=True) for _ in range(3))
    documents = ends(0)
    with autocast(CUDA, precision):
        assert attended(documents, B, T, 64, 0.0) is documents
    mask = attended(documents, B, T, 64, 0.0)
    assert mask.dtype is torch.bool
    ours, theirs = attend(q, k, v, documents), attend(q, k, v, mask)
    assert torch.allclose(ours, theirs, atol=2e-2)
    grad = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), grad), torch.autograd.grad(theirs, (q, k, v), grad), strict=True
    ):
        assert a.isfinite().all() and torch.allclose(a, b, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("family", ["gpt2", "modern"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_loss_is_that_of_the_mask_in_fp32(family: str, compiled: bool) -> None:
    """And without a wait for the device; other documents in as many pieces are not compiled again."""
    model = Model(ModelConfig(family=family, n_layer=2, n_head=2, d_model=128, seq_len=T), 1000)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.to(CUDA)
    if compiled:
        compile_model(model)
    ids = torch.randint(0, 1000, (B, T + 1), device=CUDA)
    batches = [ends(seed) for seed in range(3)]
    assert len({len(each) for each in batches}) == 1

    def loss(documents: Tensor) -> Tensor:
        with autocast(CUDA, torch.bfloat16):
            found = model.loss(ids[:, :-1], ids[:, 1:], documents)
        found.backward()
        return found.detach()

    loss(batches[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.compiler.set_stance("fail_on_recompile" if compiled else "default"):
            found = [loss(documents) for documents in batches]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(grad.isfinite().all() for grad in grads)
    if compiled:
        assert isinstance(model.compiled_hidden, OrEager) and model.compiled_hidden.is_compiled
        model.compiled_hidden = None
    with torch.no_grad():
        expected = [model.loss(ids[:, :-1], ids[:, 1:], documents) for documents in batches]
    assert torch.stack(found).tolist() == pytest.approx(torch.stack(expected).tolist(), abs=3e-2)
    assert abs(found[0] - found[1]) > 1e-5
