"""Training goes on while a checkpoint is written, and neither notices the other."""

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from harness import complains, files_no_longer_than
from rotten_checkpoints import make, same

from shards import ConfigError, DiskError, HostError, Interrupted
from train.config import ModelConfig, OptimConfig
from train.model.gpt import Model
from train.optim.groups import Optimizers
from train.state import checkpoint as checkpoints
from train.state.checkpoint import load_latest, steps
from train.state.saver import Saver, checkpoint_nbytes, require_room


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Writing of tensors waits until it is set."""
    gate, write = threading.Event(), checkpoints._write

    def late(tensors: dict[str, torch.Tensor], path: Path) -> None:
        assert gate.wait(30)
        write(tensors, path)

    monkeypatch.setattr(checkpoints, "_write", late)
    yield gate
    gate.set()


def test_what_is_written_is_what_was_when_it_was_saved(tmp_path: Path, gate: threading.Event) -> None:
    published: list[Path] = []
    checkpoint = make(10)
    with Saver(tmp_path, 2, published.append) as saver:
        saver.save(checkpoint)
        for tensors in (checkpoint.model, checkpoint.state):
            for tensor in tensors.values():
                tensor.zero_()
        saver.check()
        assert not steps(tmp_path) and not published
        gate.set()
        saver.wait()
        assert published == steps(tmp_path) == [tmp_path / "step-000010"]
    found = load_latest(tmp_path)
    assert found is not None and same(found, make(10))


def test_one_save_at_a_time(tmp_path: Path, gate: threading.Event) -> None:
    with Saver(tmp_path, 2, lambda _: None) as saver:
        saver.save(make(10))
        threading.Timer(0.05, gate.set).start()
        saver.save(make(20))
        assert (tmp_path / "step-000010").exists()
    assert [path.name for path in steps(tmp_path)] == ["step-000010", "step-000020"]


def test_what_goes_wrong_is_raised_at_the_next_step(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, make(10), keep=1)
    with (
        files_no_longer_than(1000),
        complains(DiskError, "step-000020"),
        Saver(tmp_path, 1, lambda _: None) as saver,
    ):
        saver.save(make(20))
        while True:
            saver.check()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000010"]
    found = load_latest(tmp_path)
    assert found is not None and same(found, make(10))


def test_the_end_waits_and_says_what_went_wrong(tmp_path: Path) -> None:
    (tmp_path / "step-000020").write_bytes(b"")
    with complains(ConfigError, "step-000020"), Saver(tmp_path, 2, print) as saver:
        saver.save(make(20))


def test_another_error_is_not_hidden_by_a_failed_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "step-000020").write_bytes(b"")
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(ZeroDivisionError),
        Saver(tmp_path, 2, lambda _: None) as saver,
    ):
        saver.save(make(20))
        raise ZeroDivisionError
    assert "step-000020: cannot be written" in caplog.text


def test_a_second_signal_waits_for_nothing(tmp_path: Path, gate: threading.Event) -> None:
    with pytest.raises(Interrupted), Saver(tmp_path, 2, lambda _: None) as saver:
        saver.save(make(10))
        raise Interrupted(2, "ended at once")
    assert not steps(tmp_path)
    gate.set()
    assert saver._thread is not None
    saver._thread.join()


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("family", ["gpt2", "modern"])
def test_the_size_expected_is_the_size_written(tmp_path: Path, name: str, family: str) -> None:
    model = Model(ModelConfig(family=family, n_layer=2, n_head=2, d_model=128, seq_len=32), 500)  # type: ignore[arg-type]
    optimizers = Optimizers(model, OptimConfig(name=name))  # type: ignore[arg-type]
    tokens = torch.randint(0, 500, (2, 33))
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()  # type: ignore[no-untyped-call]
    optimizers.step()
    state = {**optimizers.state(), "rng.cpu": torch.get_rng_state(), "loss_sum": torch.zeros(())}
    path = checkpoints.save(tmp_path, make(10)._replace(model=model.state_dict(), state=state), keep=1)
    written = sum(file.stat().st_size for file in path.iterdir())
    assert checkpoint_nbytes(model, optimizers) == pytest.approx(written, rel=0.02)


def test_room_is_asked_for_before_anything_is_written(tmp_path: Path) -> None:
    folder, nbytes = tmp_path / "runs" / "a" / "checkpoints", 2**60
    with complains(DiskError, str(folder), f"{4 * nbytes:,}"):
        require_room(folder, nbytes, keep=2, saves=9)
    with complains(DiskError, f"{nbytes:,}"):
        require_room(folder, nbytes, keep=2, saves=1)
    require_room(folder, nbytes, keep=2, saves=0)
    require_room(folder, 1, keep=2, saves=9)
    assert not (tmp_path / "runs").exists()


def test_what_is_there_needs_no_more_room(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        checkpoints.save(tmp_path, make(step), keep=9)
    nbytes = 2**60
    for keep, saves, count in ((2, 9, 1), (9, 9, 8), (9, 1, 1), (1, 9, 1)):
        with complains(DiskError, f"{count * nbytes:,}"):
            require_room(tmp_path, nbytes, keep, saves)


def test_a_folder_where_nothing_may_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere; a read-only disk is in faults
    why, mend = "checkpoints are to be written there; nothing was changed", "make it writable, or choose another place"
    with complains(HostError, f"{tmp_path}: not writable", why, f"hint: {mend} with --home DIR"):
        require_room(tmp_path / "checkpoints", 1, keep=1, saves=1)
