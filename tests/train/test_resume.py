"""Kill it at any moment and run it again: the same losses and the same weights, bit for bit."""

import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from harness import command, complains, millpond, results
from training import Stopped, stop_at, trained, unheard

from shards import CorruptError, OutOfTime, RefusedError
from shards.errors import RESUME
from train import evaluate as evaluating
from train import loop
from train.config import ModelConfig, OptimConfig, TrainConfig
from train.data.sources import Source
from train.evaluate import evaluate
from train.events import Ended, Evaluated, Event, Logged, Sampled, Saved, Started
from train.job import Job
from train.loop import train
from train.session import Session
from train.state import checkpoint as checkpoints
from train.state.checkpoint import BEST, Best, load_best, load_latest, save, step_of, steps
from train.telemetry.metrics import read_rows


def job(tokens: Path, root: Path, **train: Any) -> Job:
    config = {"steps": 24, "batch_tokens": 256, "log_every": 3, "eval_every": 8, "checkpoint_every": 5, **train}
    return Job(
        recipe="00" * 32,
        model=ModelConfig(family="gpt2", n_layer=1, n_head=2, d_model=32, seq_len=32, dropout=0.1),
        optim=OptimConfig(name="muon", warmup_steps=3),
        train=TrainConfig(eval_tokens=640, final_eval_tokens=960, sample_every=8, sample_tokens=4, **config),
        sources=(Source(tokens, 5),),
        checkpoints=root / "checkpoints",
        metrics=root / "metrics.jsonl",
        samples=root / "samples.jsonl",
    )


@pytest.fixture(scope="module")
def undisturbed(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("undisturbed")
    return root, trained(job(tiny_folder, root)).weights_sha256


@pytest.mark.parametrize("kind", [Logged, Evaluated, Sampled, Saved])
@pytest.mark.parametrize("step", [1, 9, 16])
def test_stopped_anywhere_and_resumed(
    tiny_folder: Path, tmp_path: Path, undisturbed: tuple[Path, str], kind: type[Event], step: int
) -> None:
    """Dropout is on, and log rows cross checkpoints, so generators and running sums must come back as well."""
    with pytest.raises(Stopped):
        trained(job(tiny_folder, tmp_path), stop_at(step, kind))
    result = trained(job(tiny_folder, tmp_path))
    root, weights = undisturbed
    assert result.weights_sha256 == weights
    assert results(tmp_path / "metrics.jsonl") == results(root / "metrics.jsonl")
    assert results(tmp_path / "samples.jsonl") == results(root / "samples.jsonl")


class Burning:
    """A card that has used one kWh since it was looked at first."""

    def joules(self) -> float:
        return 3.6e6

    def close(self) -> None:
        pass


def test_what_was_spent_goes_on_and_changes_nothing(
    tiny_folder: Path, tmp_path: Path, undisturbed: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.session.gpu_power", lambda _: Burning())
    wanted = job(tiny_folder, tmp_path, kwh_price=0.5)
    with pytest.raises(Stopped):
        trained(wanted, stop_at(10, Saved))
    saved = load_latest(wanted.checkpoints)
    assert saved and saved.progress.energy_kwh == 1 and saved.progress.seconds > 0
    events: list[Event] = []
    trained(wanted, events.append)
    found = [row for row in read_rows(tmp_path / "metrics.jsonl") if "energy_kwh" in row]
    assert [(row["step"], row["energy_kwh"], row["cost"]) for row in found] == [
        *((step, 1, 0.5) for step in (3, 6, 9)),
        *((step, 2, 1.0) for step in (12, 15, 18, 21, 24)),
    ]
    end = events[-1]
    assert isinstance(end, Ended)
    assert (end.tokens, end.summary["energy_kwh"]) == (24 * 256, 2)
    assert end.summary["tok_per_s"] < end.tokens / saved.progress.seconds
    assert results(tmp_path / "metrics.jsonl") == results(undisturbed[0] / "metrics.jsonl")


def test_a_finished_run_measures_the_same_again(
    tiny_folder: Path, tmp_path: Path, undisturbed: tuple[Path, str]
) -> None:
    root, weights = undisturbed
    shutil.copytree(root, tmp_path / "run")
    before = results(tmp_path / "run" / "metrics.jsonl")
    result = trained(job(tiny_folder, tmp_path / "run"))
    assert result.weights_sha256 == weights
    assert result.evaluation.loss == before[-1]["val_loss"]
    assert results(tmp_path / "run" / "metrics.jsonl") == before


@pytest.mark.slow
def test_another_micro_batch_sees_the_same_data(
    tiny_folder: Path, tmp_path: Path, undisturbed: tuple[Path, str]
) -> None:
    wanted = job(tiny_folder, tmp_path)
    wanted = wanted._replace(model=msgspec.structs.replace(wanted.model, dropout=0.0))
    trained(wanted._replace(metrics=tmp_path / "a"))
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(Stopped):
        trained(wanted, stop_at(10, Saved))
    smaller = wanted._replace(train=msgspec.structs.replace(wanted.train, micro_batch=2))
    trained(smaller)
    for ours, theirs in zip(results(tmp_path / "metrics.jsonl"), results(tmp_path / "a"), strict=True):
        assert ours.keys() == theirs.keys()
        norms = ours.pop("grad_norm", 0.0), theirs.pop("grad_norm", 0.0)  # of what the losses cancel out
        assert norms[0] == pytest.approx(norms[1], rel=1e-3)
        assert [ours[key] for key in ours] == pytest.approx([theirs[key] for key in ours], rel=1e-5)


def evaluation_fails(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The `number`-th, from 0 on, and those after it."""
    seen = 0

    def measure(*arguments: Any, **options: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen > number:
            raise Stopped
        return evaluate(*arguments, **options)

    monkeypatch.setattr(evaluating, "evaluate", measure)


@pytest.mark.parametrize(("number", "step"), [(1, 8), (2, 16), (3, 24), (4, 24)])
def test_an_evaluation_that_fails_costs_no_training(
    tiny_folder: Path,
    tmp_path: Path,
    undisturbed: tuple[Path, str],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    step: int,
) -> None:
    """The checkpoint of its step is there; the run that resumes from it evaluates first, and writes the same rows."""
    wanted = job(tiny_folder, tmp_path)
    with monkeypatch.context() as patch:
        evaluation_fails(patch, number)
        with pytest.raises(Stopped):
            trained(wanted)
    assert step_of(steps(wanted.checkpoints)[-1]) == step
    again = Session(wanted)
    assert again.state.step == step
    root, weights = undisturbed
    result = train(again, unheard)
    assert result.weights_sha256 == weights
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert results(tmp_path / name) == results(root / name)
    assert (wanted.checkpoints / BEST).read_bytes() == (root / "checkpoints" / BEST).read_bytes()
    assert [path.name for path in steps(wanted.checkpoints)] == [path.name for path in steps(root / "checkpoints")]


def test_a_sample_that_fails_costs_no_training(
    tiny_folder: Path, tmp_path: Path, undisturbed: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> str:
        raise Stopped

    wanted = job(tiny_folder, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "generate", fail)
        with pytest.raises(Stopped):
            trained(wanted)
    assert step_of(steps(wanted.checkpoints)[-1]) == 8
    assert trained(wanted).weights_sha256 == undisturbed[1]
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert results(tmp_path / name) == results(undisturbed[0] / name)


def test_each_evaluation_is_over_the_same_tokens_and_the_final_one_over_more(undisturbed: tuple[Path, str]) -> None:
    rows = [row for row in results(undisturbed[0] / "metrics.jsonl") if "val_loss" in row]
    assert [(row["step"], row["val_tokens"]) for row in rows] == [(0, 640), (8, 640), (16, 640), (24, 640), (24, 960)]


def test_a_run_whose_best_was_measured_over_other_tokens(tiny_folder: Path, tmp_path: Path) -> None:
    """As before evaluations on the way were short: the best is in the checkpoint, and there is no mark."""
    wanted = job(tiny_folder, tmp_path)
    with pytest.raises(Stopped):
        trained(wanted, stop_at(15, Saved))
    newest = load_latest(wanted.checkpoints)
    assert newest is not None and newest.step == 15
    (wanted.checkpoints / BEST).unlink()
    old = msgspec.structs.replace(newest.progress, best=Best(8, 1.0, 1280))
    save(wanted.checkpoints, newest._replace(progress=old), keep=2)
    found = load_best(wanted.checkpoints)
    assert found is not None and found.step == 8
    assert Session(wanted).state.best == old.best
    result = trained(wanted)
    assert result.best is not None and (result.best.step, result.best.val_tokens) == (24, 640)


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (Started, "step 0: .*validation loss"),
        (Evaluated, "step 5: .*weight"),
    ],
)
def test_a_run_that_diverges_stops_before_it_is_saved(
    tiny_folder: Path, tmp_path: Path, event: type[Event], message: str
) -> None:
    """By the first evaluation, or by the first save, though no log step has come yet."""

    def poison(happened: Event) -> None:
        if isinstance(happened, event):
            next(run.model.parameters()).data[:] = float("inf")

    run = Session(job(tiny_folder, tmp_path, log_every=100))
    with pytest.raises(RefusedError, match=message):
        train(run, poison)
    assert "null" not in (tmp_path / "metrics.jsonl").read_text()
    assert not (tmp_path / "checkpoints").exists()


def evaluations(path: Path) -> dict[int, float]:
    """Those over 640 tokens, after a step."""
    return {row["step"]: row["val_loss"] for row in results(path) if row.get("val_tokens") == 640 and row["step"]}


def test_the_best_evaluation_is_kept(tiny_folder: Path, tmp_path: Path) -> None:
    """Something spoils the model at step 30, so the best is not the last; it was saved though no save was due."""

    def spoil(event: Event) -> None:
        if isinstance(event, Logged) and event.row["step"] == 30:
            for weight in run.model.parameters():
                weight.data += 0.5

    wanted = job(tiny_folder, tmp_path, steps=40, eval_every=4, checkpoint_every=40, keep_checkpoints=1)
    run = Session(wanted)
    whole = train(run, spoil)
    losses = evaluations(tmp_path / "metrics.jsonl")
    best = min(losses, key=lambda step: losses[step])
    assert best == 28
    assert whole.best == Best(best, losses[best], 640)
    assert [step_of(path) for path in steps(tmp_path / "checkpoints")] == [best, 40]
    found = load_best(tmp_path / "checkpoints")
    assert found is not None and found.step == best

    again = wanted._replace(checkpoints=tmp_path / "again", metrics=tmp_path / "b", samples=tmp_path / "c")
    with pytest.raises(Stopped):
        trained(again, stop_at(best + 1, Logged))
    run = Session(again)
    assert train(run, spoil) == whole
    assert [step_of(path) for path in steps(tmp_path / "again")] == [best, 40]


@pytest.mark.slow
def test_the_best_is_marked_once_its_checkpoint_is_there(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a run that is killed between the two has lost the best one from before."""
    there: list[bool] = []
    mark = checkpoints.mark_best

    def slowly(*arguments: Any) -> Path:
        time.sleep(0.3)
        return save(*arguments)

    def marked(folder: Path, best: Best) -> None:
        there.append(best.step in map(step_of, steps(folder)))
        mark(folder, best)

    monkeypatch.setattr(checkpoints, "save", slowly)
    monkeypatch.setattr(checkpoints, "mark_best", marked)
    trained(job(tiny_folder, tmp_path))
    assert there and all(there)


def test_a_damaged_best_is_best_no_more(tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted = job(tiny_folder, tmp_path)
    with pytest.raises(Stopped):
        trained(wanted, stop_at(11, Logged))
    assert Session(wanted).state.best is not None
    (tmp_path / "checkpoints" / "step-000008" / "model.safetensors").write_bytes(b"")
    assert Session(wanted).state.best is None
    assert "the best checkpoint is damaged" in caplog.text


def test_time_that_is_up(tiny_folder: Path, tmp_path: Path, undisturbed: tuple[Path, str]) -> None:
    for step in (1, 2):
        with complains(OutOfTime, f"step {step}", "24"):
            trained(job(tiny_folder, tmp_path), until=time.monotonic())
        assert step_of(steps(tmp_path / "checkpoints")[-1]) == step
    result = trained(job(tiny_folder, tmp_path), until=time.monotonic() + 3600)
    root, weights = undisturbed
    assert result.weights_sha256 == weights
    assert results(tmp_path / "metrics.jsonl") == results(root / "metrics.jsonl")


@pytest.mark.slow
def test_max_hours(tiny_toml: Path, tmp_path: Path) -> None:
    options = ("--name", "night", "--home", tmp_path, "--set", "train.steps=3")
    done = millpond("train", tiny_toml, *options, "--max-hours", "1e-6")
    assert done.returncode == 75, done.stderr
    assert "stopped: time is up: saved at step 1 of 3\n" in done.stderr
    assert millpond("train", tiny_toml, *options, "--max-hours", "1").returncode == 0
    numbers = json.loads((tmp_path / "runs" / "night" / "receipt.json").read_text())["result"]
    short, final = [row for row in read_rows(tmp_path / "runs" / "night" / "metrics.jsonl") if "val_loss" in row][-2:]
    assert numbers["best_step"] == 3 and numbers["best_val_loss"] == short["val_loss"]
    assert (numbers["val_loss"], numbers["val_tokens"]) == (final["val_loss"], 4096)
    for verb in ("evaluate", "sample"):
        assert millpond(verb, "night", "--best", "--tokens", "40", "--home", tmp_path).returncode == 0


def final(home: Path, name: str) -> tuple[list[dict[str, Any]], str]:
    run = home / "runs" / name
    return results(run / "metrics.jsonl"), json.loads((run / "receipt.json").read_text())["result"]["weights_sha256"]


def last_step(path: Path) -> int:
    found = read_rows(path)
    return int(found[-1]["step"]) if found else 0


@pytest.mark.slow
def test_sigkill_at_random_moments(tiny_toml: Path, tmp_path: Path) -> None:
    """The command itself, killed three times and run again. The step at which it dies is drawn anew each time."""
    options = ("--home", tmp_path, "--set", "train.steps=200", "--set", "train.checkpoint_every=20")
    assert millpond("train", tiny_toml, "--name", "calm", *options).returncode == 0
    seed = random.randrange(2**32)
    moments = random.Random(seed)
    metrics = tmp_path / "runs" / "killed" / "metrics.jsonl"
    kills = 0
    for base in (0, 60, 120):
        process = subprocess.Popen(
            command("train", tiny_toml, "--name", "killed", *options),
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        step = base + moments.randrange(5, 60)
        while process.poll() is None and last_step(metrics) < step:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills == 3, "the run ended before it could be killed"
    assert millpond("train", tiny_toml, "--name", "killed", *options).returncode == 0
    assert final(tmp_path, "killed") == final(tmp_path, "calm"), f"seed {seed}"


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_saves_and_exits(tiny_toml: Path, tmp_path: Path, signum: int, code: int) -> None:
    options = (
        "--name",
        "stopped",
        "--home",
        tmp_path,
        "--set",
        "train.steps=100000",
        "--set",
        "train.checkpoint_every=0",
    )
    process = subprocess.Popen(command("train", tiny_toml, *options), stderr=subprocess.PIPE, text=True)
    run = tmp_path / "runs" / "stopped"
    while process.poll() is None and last_step(run / "metrics.jsonl") < 5:
        time.sleep(0.005)
    process.send_signal(signum)
    _, log = process.communicate(timeout=60)
    assert process.returncode == code, log
    step = last_step(run / "metrics.jsonl")
    assert [path.name for path in steps(run / "checkpoints")] == [f"step-{step:06}"]
    assert f"saved at step {step} of 100000" in log
    assert RESUME in log


def test_a_checkpoint_of_another_version_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    """Whole by its hashes, and a tensor short."""
    wanted = job(tiny_folder, tmp_path)
    with pytest.raises(Stopped):
        trained(wanted, stop_at(5, Saved))
    newest = load_latest(wanted.checkpoints)
    assert newest is not None
    short = {name: value for name, value in newest.state.items() if name != "guard.values"}
    save(wanted.checkpoints, newest._replace(state=short), keep=2)
    with complains(CorruptError, "step 5", "'guard.values'") as caught:
        Session(wanted)
    assert "--fresh" in caught.value.fix
