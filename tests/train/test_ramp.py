"""How many tokens each step learns from: equal parts of the run, and one sum."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import ConfigError
from train.config import ModelConfig, TrainConfig
from train.model.gpt import Model
from train.schedule import Ramp, rank_share

MODEL = ModelConfig(seq_len=32)
sizes = st.integers(1, 40).map(lambda sequences: 32 * sequences)


def test_three_sizes_share_the_tokens() -> None:
    train = TrainConfig(tokens=3 * 32 * 48 * 1000, batch_ramp=(32 * 16, 32 * 24), batch_tokens=32 * 48)
    ramp = Ramp(MODEL, train)
    assert ramp.steps == 3000 + 2000 + 1000
    assert ramp.tokens == train.tokens
    assert [ramp.batch_tokens(step) for step in (0, 2999, 3000, 4999, 5000, 5999)] == [512, 512, 768, 768, 1536, 1536]
    assert ramp.sequences == 8


def test_three_sizes_share_the_steps() -> None:
    ramp = Ramp(MODEL, TrainConfig(steps=10, batch_ramp=(32, 64), batch_tokens=96))
    assert [ramp.batch_tokens(step) for step in range(10)] == [32] * 3 + [64] * 3 + [96] * 4


@given(st.lists(sizes, max_size=3), sizes, st.integers(1, 10**7), st.booleans())
def test_the_parts_add_up(ramp_sizes: list[int], size: int, length: int, in_steps: bool) -> None:
    *ramp_sizes, size = sorted([*ramp_sizes, size])
    long = {"steps": length % 1000 + 4} if in_steps else {"tokens": length}
    ramp = Ramp(MODEL, TrainConfig(batch_ramp=tuple(ramp_sizes), batch_tokens=size, **long))
    assert ramp.tokens == ramp.tokens_before(ramp.steps)
    for step in {0, 1, ramp.steps // 2, ramp.steps - 1} & set(range(ramp.steps)):
        assert ramp.tokens_before(step + 1) == ramp.tokens_before(step) + ramp.batch_tokens(step)
        assert ramp.batch_tokens(step) % (32 * ramp.sequences) == 0
    if not in_steps and length > 10**6:
        assert abs(ramp.tokens - length) <= max([*ramp_sizes, size]) * 2


@pytest.mark.parametrize(
    ("train", "what"),
    [
        (TrainConfig(steps=3, batch_tokens=100), "train.batch_tokens is 100, not a multiple of model.seq_len, 32"),
        (
            TrainConfig(steps=3, batch_tokens=64, batch_ramp=(100,)),
            "train.batch_ramp is 100, not a multiple of model.seq_len, 32",
        ),
        (
            TrainConfig(steps=3, batch_tokens=64, batch_ramp=(32, 96)),
            "train.batch_ramp is 32, 96, train.batch_tokens 64",
        ),
        (
            TrainConfig(steps=3, batch_tokens=128, batch_ramp=(96,), micro_batch=2),
            "train.micro_batch is 2, a step has 3 sequences",
        ),
        (TrainConfig(batch_tokens=64), "train.tokens is 0 and train.steps is 0"),
        (TrainConfig(batch_tokens=64, steps=3, tokens=99), "train.tokens is 99 and train.steps is 3"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(train: TrainConfig, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Ramp(MODEL, train)
    assert caught.value.what == what


@pytest.mark.parametrize(
    ("family", "d_model", "says"),
    [("modern", 45, "is an even number"), ("modern", 44, "is an even number"), ("gpt2", 46, "is a whole number")],
)
def test_head_widths_that_cannot_be(family: str, d_model: int, says: str) -> None:
    model = ModelConfig(family=family, n_head=4, d_model=d_model, seq_len=8)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=says):
        rank_share(model, TrainConfig(steps=1, batch_tokens=8), 1)


def test_an_odd_head_is_fine_without_rotary_positions() -> None:
    model = ModelConfig(family="gpt2", n_head=4, d_model=44, seq_len=8)
    assert rank_share(model, TrainConfig(steps=1, batch_tokens=8), 1).batch_tokens == 8
    ids = torch.zeros(1, 8, dtype=torch.long)
    assert Model(model, 50).loss(ids, ids).isfinite()
