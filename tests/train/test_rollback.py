"""A run that meets bad data goes back, around it and on; killed on the way, it does so again."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import complains, results
from training import Stopped, trained, unheard

from shards import Interrupted, RefusedError
from train import session
from train.config import ModelConfig, OptimConfig, TrainConfig
from train.data.batch import Batch
from train.data.loader import TokenLoader
from train.data.sources import Source
from train.events import Evaluated, Event, Logged, Report, RolledBack, Saved
from train.job import Job
from train.loop import train
from train.model.gpt import Model
from train.session import Session
from train.state import checkpoint as checkpoints
from train.telemetry.metrics import RowLog

SEQUENCES = 4  # a step's


def job(tokens: Path, root: Path, **train: Any) -> Job:
    config = {"log_every": 2, "eval_every": 8, "checkpoint_every": 5, "rollback_after": 4, **train}
    return Job(
        recipe="00" * 32,
        model=ModelConfig(family="gpt2", n_layer=1, n_head=2, d_model=16, seq_len=32, dropout=0.1),
        optim=OptimConfig(name="muon", warmup_steps=3),
        train=TrainConfig(
            steps=24, batch_tokens=SEQUENCES * 32, eval_tokens=640, final_eval_tokens=640, sample_every=0, **config
        ),
        sources=(Source(tokens, 5),),
        checkpoints=root / "checkpoints",
        metrics=root / "metrics.jsonl",
        samples=root / "samples.jsonl",
    )


def rows(root: Path) -> list[dict[str, Any]]:
    return results(root / "metrics.jsonl")


@pytest.fixture
def bad(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The batches, counted from 0, that make the loss NaN in training: by their place in the data, as bad data does."""
    chosen: set[int] = set()
    factor = 1.0

    class Poisoned(TokenLoader):
        def next(self) -> Batch:
            nonlocal factor
            factor = torch.nan if self.position // SEQUENCES in chosen else 1.0
            return super().next()

    whole = Model.loss

    def loss(model: Model, *batch: Any) -> torch.Tensor:
        return whole(model, *batch) * (factor if model.training else 1.0)

    monkeypatch.setattr(session, "TokenLoader", Poisoned)
    monkeypatch.setattr(Model, "loss", loss)
    return chosen


def stop_at(kind: type[Event], number: int) -> Report:
    """Stops at the `number`-th such event, from 0 on."""
    seen = 0

    def report(event: Event) -> None:
        nonlocal seen
        if isinstance(event, kind):
            seen += 1
            if seen > number:
                raise Stopped

    return report


def test_a_few_bad_steps_are_skipped_and_told(
    tiny_folder: Path, tmp_path: Path, bad: set[int], caplog: pytest.LogCaptureFixture
) -> None:
    """A log row counts them and its loss is that of the others; where all are bad, there is no row."""
    bad |= {1, 6, 7, 12}
    run = Session(job(tiny_folder, tmp_path))
    train(run, unheard)
    logs = {row["step"]: row for row in rows(tmp_path) if "loss" in row}
    assert {step: row["skipped_steps"] for step, row in logs.items()} == {
        2: 1, 4: 1, 6: 1, 10: 3, 12: 3, 14: 4, 16: 4, 18: 4, 20: 4, 22: 4, 24: 4
    }  # fmt: skip
    assert logs[2]["grad_norm"] == 0
    assert all(tensor.isfinite().all() for tensor in run.model.state_dict().values())
    assert [record.getMessage() for record in caplog.records] == [
        f"skipped (non-finite or spike): {steps}"
        for steps in (
            "step 2 (windows 4-7)",
            "step 7 (windows 24-27), step 8 (windows 28-31)",
            "step 13 (windows 48-51)",
        )
    ]


def test_a_bad_stretch_is_gone_around(tiny_folder: Path, tmp_path: Path, bad: set[int]) -> None:
    """Batches 7 to 16: twice back to step 5, since the first time ends in the middle of them; one more is skipped."""
    bad |= set(range(7, 17))
    events: list[Event] = []
    run = Session(job(tiny_folder, tmp_path))
    train(run, events.append)
    backs = [event for event in events if isinstance(event, RolledBack)]
    assert [(back.bad, back.skipped) for back in backs] == [(11, (20, 44)), (10, (20, 64))]
    found = rows(tmp_path)
    (back,) = (row for row in found if "rollback_from" in row)
    assert back == {"step": 6, "rollback_from": 10, "windows_skipped": [20, 64]}
    assert [row["step"] for row in found] == sorted(row["step"] for row in found)
    assert [row["step"] for row in found if "loss" in row] == list(range(2, 25, 2))
    assert found[-2]["skipped_steps"] == 1
    assert run.state.position == 4 * 24 + 44
    assert all(tensor.isfinite().all() for tensor in run.model.state_dict().values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("event", "number"),
    [(RolledBack, 0), (RolledBack, 1), *((Logged, n) for n in range(14)), (Saved, 1), (Saved, 2), (Evaluated, 2)],
)
def test_killed_on_the_way_it_ends_the_same(
    tiny_folder: Path, tmp_path: Path, bad: set[int], event: type[Event], number: int
) -> None:
    bad |= {2, *range(7, 17), 20}
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    weights = []
    for root in (calm, killed):
        root.mkdir()
        if root is killed:
            with pytest.raises(Stopped):
                trained(job(tiny_folder, root), stop_at(event, number))
        weights.append(trained(job(tiny_folder, root)).weights_sha256)
    assert weights[0] == weights[1]
    assert rows(calm) == rows(killed)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["metrics.jsonl", "samples.jsonl"])
def test_killed_in_the_middle_of_going_back(
    tiny_folder: Path, tmp_path: Path, bad: set[int], monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    bad |= set(range(7, 12))
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    weights = []
    for root in (calm, killed):
        root.mkdir()
        if root is killed:
            with monkeypatch.context() as patch:
                cut_back = RowLog.cut_back

                def stop(log: RowLog, step: int, cut_back: Any = cut_back) -> None:
                    cut_back(log, step)
                    if log.path.name == file:
                        raise Stopped

                patch.setattr(RowLog, "cut_back", stop)
                with pytest.raises(Stopped):
                    trained(job(tiny_folder, root))
        weights.append(trained(job(tiny_folder, root)).weights_sha256)
    assert weights[0] == weights[1]
    assert rows(calm) == rows(killed)


@pytest.mark.slow
def test_the_best_survives_going_back_to_it(tiny_folder: Path, tmp_path: Path, bad: set[int]) -> None:
    """Step 8 is evaluated after its checkpoint was saved; from 9 to 12 all is bad, and the run goes back to 8."""
    bad |= set(range(8, 14))
    known = []

    def tell(event: Event) -> None:
        if isinstance(event, RolledBack):
            known.append((event.step, run.state.best))

    run = Session(job(tiny_folder, tmp_path, eval_every=4, checkpoint_every=0))
    train(run, tell)
    (eighth,) = (row for row in rows(tmp_path) if row["step"] == 8 and "val_loss" in row)
    assert known[0] == (8, checkpoints.Best(8, eighth["val_loss"], 640))


def test_what_never_ends_is_refused(tiny_folder: Path, tmp_path: Path, bad: set[int]) -> None:
    """After three times, with the checkpoint from before whole; and none from the middle of it."""
    bad |= set(range(7, 1000))
    with complains(RefusedError, "step 10", "5 steps", "3 times") as caught:
        trained(job(tiny_folder, tmp_path))
    assert "--fresh --set optim.lr=0.0083" in caught.value.fix
    assert caught.value.exit_code == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000005"]
    saved = checkpoints.load_latest(tmp_path / "checkpoints")
    assert saved is not None and all(tensor.isfinite().all() for tensor in saved.model.values())


def test_with_nothing_to_go_back_to_it_is_refused(tiny_folder: Path, tmp_path: Path, bad: set[int]) -> None:
    bad |= set(range(1000))
    with complains(RefusedError, "step 4", "4 steps"):
        trained(job(tiny_folder, tmp_path))
    assert not (tmp_path / "checkpoints").exists()


def test_never_means_never(tiny_folder: Path, tmp_path: Path, bad: set[int]) -> None:
    bad |= set(range(7, 1000))
    trained(job(tiny_folder, tmp_path, rollback_after=0))
    saved = checkpoints.load_latest(tmp_path / "checkpoints")
    assert saved is not None and saved.progress.step == 24
    assert saved.state["guard.in_a_row"] == 17


def test_a_checkpoint_waits_for_a_step_that_is_taken(tiny_folder: Path, tmp_path: Path, bad: set[int]) -> None:
    """Steps 10 and 11 are skipped, so that of 10 is saved at 12; 8 and 16 are the best so far."""
    bad |= {9, 10}
    saves = []
    keep = job(tiny_folder, tmp_path, keep_checkpoints=9)
    trained(keep, lambda event: saves.append(event.step) if isinstance(event, Saved) else None)
    assert saves == [5, 8, 12, 15, 16, 20, 24]


def test_a_bad_weight_goes_back_too(tiny_folder: Path, tmp_path: Path) -> None:
    """Poisoned behind step 6; found by the evaluation at 8, when two steps in a row have been skipped."""
    poisoned = []

    def poison(event: Event) -> None:
        events.append(event)
        if isinstance(event, Logged) and event.row["step"] == 6 and not poisoned:
            poisoned.append(run)
            next(run.model.parameters()).data[:] = torch.inf

    events: list[Event] = []
    run = Session(job(tiny_folder, tmp_path))
    train(run, poison)
    assert len([event for event in events if isinstance(event, RolledBack)]) == 1
    (back,) = (row for row in rows(tmp_path) if "rollback_from" in row)
    assert back == {"step": 6, "rollback_from": 8, "windows_skipped": [20, 32]}
    assert all(tensor.isfinite().all() for tensor in run.model.state_dict().values())


@pytest.mark.slow
def test_a_signal_is_obeyed_in_the_middle_of_it(tiny_folder: Path, tmp_path: Path, bad: set[int]) -> None:
    """It comes at 8 and saves at 9, which was skipped: the weights are good. The run goes on, and back to there."""
    bad |= {7, 8, 9, 10}
    wanted = job(tiny_folder, tmp_path, rollback_after=3)

    def interrupt(event: Event) -> None:
        if isinstance(event, Logged) and event.row["step"] == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    with complains(Interrupted, "step 9", "24"):
        trained(wanted, interrupt)
    trained(wanted)
    (back,) = (row for row in rows(tmp_path) if "rollback_from" in row)
    assert back == {"step": 10, "rollback_from": 10, "windows_skipped": [36, 40]}
    assert rows(tmp_path)[-2]["skipped_steps"] == 3


def test_the_terminal_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    from pipeline.terminal import Terminal

    Terminal().training(RolledBack(1500, 1620, (24000, 25920), ""))
    assert capsys.readouterr().err == "     1620  back to step 1,500, without windows 24,000 to 25,919\n"
