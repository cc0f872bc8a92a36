"""What is said of a run before it begins: how much of it is evaluation."""

import pytest

from train.config import TrainConfig
from train.dry_run import evaluation_tokens


@pytest.mark.parametrize(
    ("every", "final", "val_tokens", "expected"),
    [
        (20, 300, 10_000, 4 * 100 + 300),  # at 0, 20, 40 and 50
        (25, 300, 10_000, 3 * 100 + 300),  # the last step is one of them
        (0, 300, 10_000, 2 * 100 + 300),
        (20, 100, 10_000, 4 * 100),  # the last of them is the final one as well
        (20, 300, 250, 4 * 100 + 250),
        (20, 300, 60, 4 * 60),  # the last of them has read all of it
    ],
)
def test_all_evaluations_are_counted(every: int, final: int, val_tokens: int, expected: int) -> None:
    train = TrainConfig(eval_every=every, eval_tokens=100, final_eval_tokens=final)
    assert evaluation_tokens(train, 50, val_tokens) == expected
