"""The micro-batch finder tries what it says, chooses the smallest that is good enough, and remembers."""

from pathlib import Path

import msgspec
import pytest
import torch

from train.config import ModelConfig, OptimConfig, TrainConfig
from train.fitting import Fit, best_fit, choose, measure_apart, search

MODEL = ModelConfig(n_layer=1, n_head=2, d_model=32, seq_len=32)
TRAIN = TrainConfig(steps=1, batch_tokens=32 * 12)
CPU = torch.device("cpu")


def test_the_smallest_size_within_two_percent() -> None:
    assert choose({4: 90.0, 8: 98.1, 16: 100.0}) == 8
    assert choose({4: 90.0, 8: 97.9, 16: 100.0}) == 16
    assert choose({4: 5.0}) == 4


@pytest.mark.parametrize(
    ("start", "fits", "peak", "tried"),
    [
        (1, 99, 8, [1, 2, 4, 8, 16]),  # until the rate falls
        (4, 99, 99, [4, 8, 16, 32]),  # up to the whole batch
        (5, 8, 99, [4, 8, 16]),  # until the memory runs out
        (32, 2, 99, [32, 16, 8, 4, 2]),  # too large from the start
        (32, 0, 99, [32, 16, 8, 4, 2, 1]),  # nothing fits
    ],
)
def test_what_is_tried(start: int, fits: int, peak: int, tried: list[int]) -> None:
    asked = []

    def rate(size: int) -> float | None:
        asked.append(size)
        return None if size > fits else 1000.0 - abs(size - peak)

    found = search([1, 2, 4, 8, 16, 32], start, rate)
    assert asked == tried
    assert set(found) == {size for size in tried if size <= fits and (size <= peak or peak == 99)}


def test_real_steps_in_a_process_of_its_own() -> None:
    """On the CPU, without a limit: the path is the one a card takes."""
    before = torch.get_rng_state()
    fit = measure_apart(MODEL, OptimConfig(), TRAIN, 100, CPU, 3)
    assert fit is not None
    assert fit.micro_batch in fit.rates and 12 % fit.micro_batch == 0
    assert fit.eval_batch in fit.eval_rates
    assert next(iter(fit.rates)) == 2  # of 1, 2, 4, 12: the last that is at most 3
    assert min(*fit.rates.values(), *fit.eval_rates.values()) > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_the_cpu_is_estimated_and_what_is_asked_is_kept(tmp_path: Path) -> None:
    cache = tmp_path / "fits.json"
    assert best_fit(MODEL, OptimConfig(), TRAIN, 100, CPU, cache) == Fit(micro_batch=12, eval_batch=12)
    asked = msgspec.structs.replace(TRAIN, micro_batch=3)
    assert best_fit(MODEL, OptimConfig(), asked, 100, CPU, cache) == Fit(micro_batch=3, eval_batch=12)
    assert not list(tmp_path.iterdir())
