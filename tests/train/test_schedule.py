"""The learning rate's factor at every step that matters, written out, for runs of every length."""

import math
from itertools import pairwise, product

import pytest

from train.config import OptimConfig
from train.schedule import fitted, lr_factor, misfit

SCHEDULES = ("linear", "cosine", "wsd", "constant")
WARM, FRACTION, FINAL = 4, 0.5, 0.1
VALUES = {  # steps: {step: (linear, cosine, wsd)}; warm-up over 4 steps, decay over the last half, to a tenth
    10: {0: (0.2, 0.2, 0.2), 3: (0.8, 0.8, 0.8), 4: (1.0, 1.0, 1.0), 9: (0.1, 0.1, 0.1)},
    30: {4: (1.0, 1.0, 1.0), 14: (1.0, 0.689058, 1.0), 20: (0.64, 0.358399, 0.430792), 29: (0.1, 0.1, 0.1)},
    100: {4: (1.0, 1.0, 1.0), 49: (1.0, 0.587161, 1.0), 74: (0.55, 0.245223, 0.363604), 99: (0.1, 0.1, 0.1)},
    10_000: {
        4: (1.0, 1.0, 1.0),
        4_999: (1.0, 0.550354, 1.0),
        7_499: (0.55, 0.231927, 0.363604),
        9_998: (0.10018, 0.1, 0.10009),
        9_999: (0.1, 0.1, 0.1),
    },
}


def config(schedule: str, **fields: object) -> OptimConfig:
    chosen = {"warmup_steps": WARM, "decay_fraction": FRACTION, "final_lr": FINAL, **fields}
    return OptimConfig(schedule=schedule, **chosen)  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", VALUES)
@pytest.mark.parametrize("i", range(3))
def test_the_table(steps: int, i: int) -> None:
    for step, row in VALUES[steps].items():
        assert lr_factor(config(SCHEDULES[i]), step, steps) == pytest.approx(row[i], abs=2e-5), step


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_run_rises_once_falls_once_and_ends_at_the_final_rate(schedule: str) -> None:
    for warmup, fraction, steps in product([0, 1, 4, 20, 1000], [0.0, 0.2, 0.7, 1.0], [1, 2, 3, 5, 10, 30, 100]):
        chosen = config(schedule, warmup_steps=warmup, decay_fraction=fraction)
        factors = [lr_factor(chosen, step, steps) for step in range(steps)]
        warm, decay = fitted(chosen, steps)
        assert 0 <= warm <= max(0, steps - 1) and 0 <= decay <= max(0, steps - 1 - warm)
        assert all(0 < a < b < 1 for a, b in pairwise(factors[:warm]))
        assert decay == 0 or factors[warm] == 1.0
        assert all(a >= b for a, b in pairwise(factors[warm:]))
        assert factors[-1] == pytest.approx(1.0 if schedule == "constant" else FINAL)
        if schedule in ("linear", "cosine") and decay > 1:  # in no step further than its share of the way
            most = 0.9 * (math.pi / 2 if schedule == "cosine" else 1) / decay
            assert all(a - b <= most + 1e-9 for a, b in pairwise(factors[warm:]))
        assert bool(misfit(chosen, steps)) == (
            warm != warmup or (schedule in ("linear", "wsd") and decay < min(fraction * steps, steps - 1))
        )


def test_what_is_made_shorter_is_said() -> None:
    assert misfit(config("linear", warmup_steps=20, decay_fraction=0.7), 1000) == ""
    assert misfit(config("linear", warmup_steps=20, decay_fraction=0.7), 30) == (
        "optim.warmup_steps=20 and the decay of linear do not fit into 30 steps: warm-up takes 20, the decay the last 9"
    )
    assert "into 10 steps: warm-up takes 5, the decay the last 4" in misfit(config("cosine", warmup_steps=20), 10)


def test_runs_of_before_keep_their_arithmetic() -> None:
    """The values of commit 1e9ff52."""
    linear = OptimConfig(warmup_steps=10, decay_fraction=0.5, final_lr=0.1, schedule_rule=1)
    assert [lr_factor(linear, step, 100) for step in (0, 10, 50)] == [pytest.approx(1 / 11), 1.0, 1.0]
    assert lr_factor(linear, 75, 100) == pytest.approx(0.1 + 0.9 * 0.5)
    assert lr_factor(linear, 99, 100) == pytest.approx(0.1 + 0.9 / 50)
    assert lr_factor(linear, 10, 11) == pytest.approx(0.1 + 0.9 / 5.5)  # a jump, as it was
    cosine = OptimConfig(schedule="cosine", warmup_steps=20, final_lr=0.1, schedule_rule=1)
    assert lr_factor(cosine, 70, 120) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert lr_factor(cosine, 119, 120) > 0.1 == pytest.approx(lr_factor(cosine, 120, 120))
    assert misfit(OptimConfig(warmup_steps=20, schedule_rule=1), 10) == ""
