"""Two cards learn what one does; their gradients go over NCCL."""

from pathlib import Path

import pytest
import rank_work
import torch
from ranks import ranks

from train.machine.ranks import World
from train.telemetry.metrics import read_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


def test_two_cards_learn_what_one_does(tiny_folder: Path, tmp_path: Path) -> None:
    settings = {"steps": 50, "device": "cuda", "micro_batch": 4, "compile": "off", "precision": "fp32"}
    one, two = (rank_work.job(tiny_folder, tmp_path / name, **settings) for name in ("one", "two"))
    rank_work.train(World(), one)
    with ranks(2, cards=True) as started:
        first, second = started.run(rank_work.train, two)
    assert first.weights == second.weights
    found, expected = ([row["loss"] for row in read_rows(of.metrics) if "loss" in row] for of in (two, one))
    assert found == pytest.approx(expected, abs=1e-3)
    with ranks(2, cards=True) as started:
        assert started.run(rank_work.stop, two._replace(checkpoints=tmp_path / "again"), 1, 9) == [(143, 9)] * 2
