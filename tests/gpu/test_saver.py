"""On a card: what is saved is what the weights were, though the next step is under way; and a resume brings it back."""

from pathlib import Path

import pytest
import torch
from rotten_checkpoints import make

from train.state.checkpoint import load_latest
from train.state.saver import Saver

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_the_copy_waits_for_the_step_before_and_not_for_the_one_after(tmp_path: Path) -> None:
    """The weights are still being computed when they are saved, and change as soon as save() has returned."""
    weights = torch.zeros(4096, 4096, device="cuda")
    with Saver(tmp_path, 1, lambda _: None) as saver:
        for _ in range(200):
            weights += 1
        saver.save(make(10)._replace(model={"weights": weights}))
        for _ in range(200):
            weights += 1
    found = load_latest(tmp_path)
    assert found is not None
    assert found.model["weights"].device.type == "cpu"
    assert (found.model["weights"] == 200).all()
