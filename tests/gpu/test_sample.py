"""Sampling on a card: the keys and values that are kept give what reading the whole context again gives."""

import pytest
import torch

from train.config import ModelConfig
from train.model.attention import Past
from train.model.gpt import Model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("form", ["modern", "gpt2"])
@torch.no_grad()
def test_the_logits_are_those_of_the_whole_context(form: str) -> None:
    torch.manual_seed(0)
    config = ModelConfig(family=form, n_layer=2, n_head=2, d_model=128, seq_len=128)
    model = Model(config, 1000).cuda().eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    ids = torch.randint(0, 1000, (1, 128), device="cuda")
    whole, pasts = model(ids)[0], [Past(128) for _ in model.blocks]
    found = [model.next_logits(ids[:, :100], 0, pasts)[0]]
    found += [model.next_logits(ids[:, at : at + 1], at, pasts)[0] for at in range(100, 128)]
    assert torch.allclose(torch.stack(found), whole[99:], atol=1e-4, rtol=0)
