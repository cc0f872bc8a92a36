"""Trackers show what metrics.jsonl has, over restarts too, and are never the reason that a run ends.

Weights & Biases and trackio are tested where their extras are installed, offline.
"""

import json
import sqlite3
from pathlib import Path
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner
from harness import complains, states

from pipeline.cli.main import main
from pipeline.config import Recipe
from pipeline.home import trackers
from pipeline.home.layout import RunPaths
from pipeline.home.trackers import Trackers, require
from shards.errors import HostError
from train.events import Evaluated, Logged, Sampled, Started


def loss(step: int) -> float:
    return 10.0 - step / 4


def session(run: RunPaths, name: Any, first: int, last: int, *, closed: bool = True) -> Trackers:
    """The events of a run that goes on at `first` and comes to `last`; a killed one closes nothing."""
    found = Trackers((name,), run, Recipe())
    found.training(Started(step=first, **dict.fromkeys(set(Started._fields) - {"step"}, 0)))  # type: ignore[arg-type]
    if not first:
        found.training(Evaluated({"step": 0, "val_loss": loss(0)}))
    for step in range(first + 1, last + 1):
        found.training(Logged({"step": step, "loss": loss(step), "tok_per_s": step * 1.5}, 60, 1.0))
        found.training(Sampled(step, "The", "x"))
    if closed:
        found.__exit__(None, None, None)
    return found


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    (tmp_path / "night-1").mkdir()
    return RunPaths(tmp_path / "night-1")


def shown(run: RunPaths) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of the run: each curve's steps and values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own
def test_tensorboard_over_a_kill(run: RunPaths) -> None:
    """Killed after step 6, the checkpoint is of step 4: 5 and 6 come again, and are there once."""
    killed = session(run, "tensorboard", 0, 6, closed=False)
    session(run, "tensorboard", 4, 8)
    found = shown(run)
    assert found["loss"] == [(step, loss(step)) for step in range(1, 9)]
    assert found["val_loss"] == [(0, 10.0)]
    assert set(found) == {"loss", "val_loss", "tok_per_s"}
    killed.__exit__(None, None, None)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_real_run_in_tensorboard(tiny_toml: Path, tmp_path: Path) -> None:
    options = ["--set", "train.trackers=tensorboard", "--set", "train.steps=5", "--home", str(tmp_path)]
    done = CliRunner().invoke(main, ["train", str(tiny_toml), *options])
    assert done.exit_code == 0, done.stderr
    run = RunPaths(tmp_path / "runs" / "tiny")
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    found = shown(run)
    assert [step for step, _ in found["loss"]] == [1, 2, 3, 4, 5]
    for key in ("loss", "mfu_percent", "val_loss"):
        assert [value for _, value in found[key]] == pytest.approx([row[key] for row in rows if key in row], rel=1e-6)


def test_wandb_offline(run: RunPaths, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    session(run, "wandb", 0, 6)
    session(run, "wandb", 4, 8)
    assert not caplog.records
    parts = sorted((run.root / "wandb").glob("offline-run-*-night-1/run-night-1.wandb"))
    assert parts and all(path.stat().st_size for path in parts)


def test_trackio_over_a_restart(
    run: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    session(run, "trackio", 0, 6)
    session(run, "trackio", 4, 8)
    assert not caplog.records
    with sqlite3.connect(tmp_path / "trackio" / "millpond.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics").fetchall()
    assert {name for name, _, _ in rows} == {"night-1"}
    losses = {(step, json.loads(metrics)["loss"]) for _, step, metrics in rows if "loss" in json.loads(metrics)}
    assert losses == {(step, loss(step)) for step in range(1, 9)}


class Failing:
    """A tracker that works until it does not."""

    asked: ClassVar[list[int]] = []

    def __init__(self, *_: object) -> None:
        self.asked.clear()

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.asked.append(step)
        if step == 3:
            raise ConnectionError("no route to host")

    def close(self) -> None:
        raise AssertionError("it was left alone")


def test_one_that_fails_is_said_once_and_left_alone(
    run: RunPaths, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trackers, "TensorBoard", Failing)
    session(run, "tensorboard", 0, 6)
    assert Failing.asked == [0, 1, 2, 3]
    (record,) = caplog.records
    states(record.getMessage(), "tensorboard", "no route to host")


def test_one_that_cannot_begin_ends_nothing(
    run: RunPaths, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("not logged in")

    monkeypatch.setattr(trackers, "TensorBoard", refuse)
    session(run, "tensorboard", 0, 6)
    (record,) = caplog.records
    states(record.getMessage(), "tensorboard", "not logged in")


def test_what_is_not_installed_is_said_before_any_work(
    tiny_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    with complains(
        HostError,
        "train.trackers has wandb, which is not installed",
        "metrics.jsonl is written in any case",
        "hint: .venv/bin/pip install -c constraints.txt -e '.[wandb]', or leave it out of train.trackers",
    ):
        require(("wandb",))
    refused = CliRunner().invoke(
        main, ["train", str(tiny_toml), "--home", str(tmp_path / "home"), "--set", "train.trackers=wandb"]
    )
    assert refused.exit_code == 3
    assert not (tmp_path / "home" / "tokens").exists()


def test_a_tracker_nobody_knows(tiny_toml: Path, tmp_path: Path) -> None:
    refused = CliRunner().invoke(main, ["train", str(tiny_toml), "--home", str(tmp_path), "--set", "train.trackers=x"])
    assert refused.exit_code == 2
    assert "train.trackers" in refused.stderr
