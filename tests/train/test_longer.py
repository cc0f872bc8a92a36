"""A run that is made longer: every step is a pure function of its recipe, whatever was stopped and damaged on the way.

So the recipe of a run that was made longer, trained from its beginning without a stop, ends in the same bits.
"""

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from harness import complains, results
from training import Stopped, stop_at, trained

from shards.errors import ConfigError, RefusedError
from train.config import EarlierLength, ModelConfig, OptimConfig, TrainConfig
from train.data.sources import Source
from train.events import Saved
from train.job import Job
from train.schedule import Ramp, lr_factor
from train.session import Session
from train.state import checkpoint as checkpoints
from train.state.checkpoint import steps

MODEL = ModelConfig(family="gpt2", n_layer=1, n_head=2, d_model=32, seq_len=32, dropout=0.1)
SHORT = TrainConfig(
    steps=12,
    batch_tokens=128,
    log_every=5,
    eval_every=8,
    eval_tokens=320,
    final_eval_tokens=640,
    checkpoint_every=5,
    keep_checkpoints=9,
    sample_every=0,
    sample_tokens=4,
)
OPTIM = OptimConfig(warmup_steps=3)


def job(tokens: Path, root: Path, train: TrainConfig, *earlier: tuple[TrainConfig, int]) -> Job:
    def name(train: TrainConfig) -> str:
        return f"{train.steps:064}"

    root.mkdir(exist_ok=True)
    return Job(
        recipe=name(train),
        model=MODEL,
        optim=OPTIM,
        train=train,
        sources=(Source(tokens, 3),),
        checkpoints=root / "checkpoints",
        metrics=root / "metrics.jsonl",
        samples=root / "samples.jsonl",
        earlier=tuple((name(before), until) for before, until in earlier),
    )


def longer(train: TrainConfig, steps: int, until: int) -> TrainConfig:
    earlier = (*train.earlier, EarlierLength(tokens=train.tokens, steps=train.steps, until=until))
    return msgspec.structs.replace(train, tokens=0, steps=steps, earlier=earlier)


def run(job: Job, stop: int = 0) -> str:
    """Train, to the end or until the checkpoint of step `stop` is published; the hash of the weights."""

    if stop:
        with pytest.raises(Stopped):
            trained(job, stop_at(stop, Saved))
        return ""
    return trained(job).weights_sha256


def rows(root: Path) -> list[list[dict[str, Any]]]:
    return [results(root / name) for name in ("metrics.jsonl", "samples.jsonl")]


@pytest.mark.parametrize("until", [12, 10, 5])
def test_made_longer_ends_as_if_never_stopped(tiny_folder: Path, tmp_path: Path, until: int) -> None:
    """After its last step, and at a checkpoint before it; killed again while it is longer."""
    train = longer(SHORT, 24, until)
    calm = tmp_path / "calm"
    weights = run(job(tiny_folder, calm, train))
    run(job(tiny_folder, tmp_path, SHORT), stop=until if until < 12 else 0)
    longer_job = job(tiny_folder, tmp_path, train, (SHORT, until))
    run(longer_job, stop=20)
    assert run(longer_job) == weights
    assert rows(tmp_path) == rows(calm)
    evaluated = [row["step"] for row in rows(tmp_path)[0] if "val_loss" in row]
    assert evaluated == [0, 8, *([12, 12] if until == 12 else []), 16, 24, 24]


def test_a_fall_back_to_before_it_was_made_longer(tiny_folder: Path, tmp_path: Path) -> None:
    """The checkpoints from which it was made longer are damaged: those steps are repeated as they were then."""
    train = longer(SHORT, 24, 12)
    weights = run(job(tiny_folder, tmp_path / "calm", train))
    run(job(tiny_folder, tmp_path, SHORT))
    longer_job = job(tiny_folder, tmp_path, train, (SHORT, 12))
    run(longer_job, stop=15)
    for path in steps(longer_job.checkpoints)[-2:]:
        (path / "SHA256SUMS").write_text("")
    assert run(longer_job) == weights
    assert rows(tmp_path) == rows(tmp_path / "calm")


def test_made_longer_twice(tiny_folder: Path, tmp_path: Path) -> None:
    second = longer(SHORT, 16, 10)
    third = longer(second, 24, 16)
    weights = run(job(tiny_folder, tmp_path / "calm", third))
    run(job(tiny_folder, tmp_path, SHORT), stop=10)
    run(job(tiny_folder, tmp_path, second, (SHORT, 10)))
    assert run(job(tiny_folder, tmp_path, third, (SHORT, 10), (second, 16))) == weights
    assert rows(tmp_path) == rows(tmp_path / "calm")


def test_what_another_length_made_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    """A checkpoint of the earlier length belongs to the run up to the step at which it was made longer, only."""
    run(job(tiny_folder, tmp_path, SHORT))
    train = longer(SHORT, 24, 10)
    with complains(RefusedError, "step 12"):
        Session(job(tiny_folder, tmp_path, train, (SHORT, 10)))
    shutil.rmtree(tmp_path / "checkpoints" / "step-000012")
    assert Session(job(tiny_folder, tmp_path, train, (SHORT, 10))).state.step == 10
    saved = checkpoints.load_latest(tmp_path / "checkpoints")
    assert saved and saved.step == 10


def test_the_rate_follows_the_length_that_is_planned() -> None:
    ramp = Ramp(MODEL, longer(longer(SHORT, 16, 10), 24, 16))
    assert [ramp.planned(step) for step in range(24)] == [12] * 10 + [16] * 6 + [24] * 8
    assert [step for step in range(25) if ramp.ends_at(step)] == [16, 24]
    assert lr_factor(OPTIM, 16, ramp.planned(16)) > lr_factor(OPTIM, 15, ramp.planned(15))


@pytest.mark.parametrize("length", [{"steps": 10}, {"tokens": 10 * 64}, {"tokens": 6 * 32 + 4 * 64 + 5}])
def test_a_ramp_is_that_of_the_first_length(length: dict[str, int]) -> None:
    train = TrainConfig(batch_ramp=(32,), batch_tokens=64, **length)
    before = Ramp(MODEL, train)
    after = Ramp(MODEL, longer(train, before.steps + 7, before.steps))
    assert [after.batch_tokens(step) for step in range(before.steps)] == [
        before.batch_tokens(step) for step in range(before.steps)
    ]
    assert (after.steps, after.tokens) == (before.steps + 7, before.tokens + 7 * 64)
    tokens = msgspec.structs.replace(longer(train, 0, before.steps), tokens=before.tokens + 7 * 64 + 63)
    assert (Ramp(MODEL, tokens).steps, Ramp(MODEL, tokens).tokens) == (after.steps, after.tokens)


@pytest.mark.parametrize(
    ("steps", "earlier"),
    [
        (24, [{"steps": 12, "until": 13}]),
        (12, [{"steps": 12, "until": 12}]),
        (11, [{"steps": 12, "until": 4}]),
        (24, [{"steps": 12, "until": 8}, {"steps": 16, "until": 8}]),
        (24, [{"steps": 12, "until": 8}, {"steps": 16, "until": 4}]),
        (24, [{"until": 8}]),
        (24, [{"steps": 12, "tokens": 99, "until": 8}]),
    ],
)
def test_lengths_that_cannot_be(steps: int, earlier: list[dict[str, int]]) -> None:
    lengths = tuple(EarlierLength(**each) for each in earlier)
    with pytest.raises(ConfigError):
        Ramp(MODEL, TrainConfig(steps=steps, batch_tokens=128, earlier=lengths))
