"""A checkpoint is whole or it is not used; there is always one to go back to."""

import errno
import logging
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import complains, files_no_longer_than, tree

from shards import CorruptError, DiskError, HostError
from train.data.windows import LoaderState
from train.state import checkpoint as checkpoints
from train.state.checkpoint import (
    BEST,
    Best,
    Checkpoint,
    Progress,
    better,
    known_best,
    load_best,
    load_latest,
    mark_best,
    remove_surplus,
    save,
    steps,
)


def make(step: int, best: Best | None = None) -> Checkpoint:
    progress = Progress(
        step=step,
        tokens=step * 10,
        data=LoaderState(
            position=step, windows=9, seq_len=8, seed=0, order="shuffled", order_version=1, fingerprint="00" * 32
        ),
        recipe="00" * 32,
        parts=1,
        best=best,
    )
    generator = torch.Generator().manual_seed(step)
    weights = {"a": torch.randn(20, 30, generator=generator), "b": torch.randn(5, generator=generator)}
    return Checkpoint(progress, weights, {"loss_sum": torch.tensor(step / 3), "0.0.step": torch.tensor(float(step))})


def test_round_trip_and_retention(tmp_path: Path) -> None:
    for step in (5, 10, 1_000_005):
        save(tmp_path, make(step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000010", "step-1000005"]
    found = load_latest(tmp_path)
    assert found is not None
    expected = make(1_000_005)
    assert found.progress == expected.progress
    for before, after in ((expected.model, found.model), (expected.state, found.state)):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def names(folder: Path) -> list[int]:
    return [checkpoints.step_of(path) for path in steps(folder)]


def test_the_best_outlives_the_newest(tmp_path: Path) -> None:
    best = Best(10, 2.5, 640)
    for step in (5, 10, 15, 20, 25):
        save(tmp_path, make(step, best if step >= 10 else None), keep=2)
    assert names(tmp_path) == [10, 20, 25]
    found = load_best(tmp_path)
    assert found is not None and found.step == 10
    save(tmp_path, make(30, Best(30, 2.0, 640)), keep=2)
    assert names(tmp_path) == [25, 30]


def test_the_newest_is_the_best_when_its_own_evaluation_says_so(tmp_path: Path) -> None:
    """That of a later step counts for nothing: its checkpoint has not been published, or is damaged."""
    before, own = Best(5, 2.5, 640), Best(10, 2.0, 640)
    mark_best(tmp_path, before)
    save(tmp_path, make(5), keep=1)
    newest = make(10, before)
    for mark, best in ((before, before), (own, own), (Best(15, 1.0, 640), before)):
        mark_best(tmp_path, mark)
        save(tmp_path, newest, keep=1)
        assert known_best(tmp_path, newest.progress) == best
        found = load_best(tmp_path)
        assert found is not None and found.step == best.step


@pytest.mark.parametrize("bytes_", [b"", b"{}", b"[1]", b"\xff"])
def test_a_damaged_mark_is_ignored(tmp_path: Path, bytes_: bytes, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, make(5, Best(5, 2.5, 640)), keep=1)
    (tmp_path / BEST).write_bytes(bytes_)
    found = load_best(tmp_path)
    assert found is not None and found.step == 5
    assert "best.json: cannot be read, and is ignored" in caplog.text


def test_better_is_lower_over_the_same_tokens() -> None:
    first = Best(10, 2.5, 640)
    assert better(None, first) == first
    assert better(first, Best(20, 2.6, 640)) == first
    assert better(first, Best(20, 2.5, 640)) == first
    assert better(first, Best(20, 2.4, 640)).step == 20
    assert better(first, Best(20, 2.6, 6400)).step == 20
    again = Best(first.step, 2.6, 640)  # of the same step: what was measured last
    assert better(first, again) == again


def test_a_damaged_one_does_not_push_out_a_whole_one(tmp_path: Path) -> None:
    save(tmp_path, make(5), keep=2)
    (save(tmp_path, make(10), keep=2) / "state.json").write_bytes(b"{}")
    save(tmp_path, make(7), keep=1)  # the run went on from 5, and a signal ended it
    assert names(tmp_path) == [7]
    found = load_latest(tmp_path)
    assert found is not None and found.step == 7


def test_a_start_removes_what_a_killed_save_did_not(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        save(tmp_path, make(step), keep=9)
    remove_surplus(tmp_path, 20, Best(5, 1.0, 640), keep=1)
    assert names(tmp_path) == [5, 20]


@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_a_damaged_best_gives_way_to_the_newest_loudly(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    best = Best(5, 2.5, 640)
    file = save(tmp_path, make(5, best), keep=1) / "model.safetensors"
    newest = make(20, best)
    save(tmp_path, newest, keep=1)
    assert checkpoints.known_best(tmp_path, newest.progress) == best
    if damage == "flip":
        file.write_bytes(file.read_bytes()[:-1] + b"\0")
    else:
        file.unlink()
    with caplog.at_level(logging.WARNING):
        found = load_best(tmp_path)
    assert found is not None and found.step == 20
    assert "the best checkpoint is damaged; it is not the best any more" in caplog.text
    assert "using the newest, step 20" in caplog.text
    assert checkpoints.known_best(tmp_path, newest.progress) is None


def test_a_list_of_hashes_with_a_line_too_many(tmp_path: Path) -> None:
    path = save(tmp_path, make(5), keep=1)
    with (path / "SHA256SUMS").open("a") as sums:
        sums.write("\n")
    with complains(CorruptError, "SHA256SUMS"):
        checkpoints.load(path)


def test_sha256sum_can_check_it(tmp_path: Path) -> None:
    import subprocess

    path = save(tmp_path, make(1), keep=1)
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=path, check=True, capture_output=True)


def test_none_is_there(tmp_path: Path) -> None:
    assert load_latest(tmp_path) is None and checkpoints.load_chosen(tmp_path, "3") is None


@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors", "state.json", "SHA256SUMS"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "zero", "empty", "remove"])
def test_a_damaged_newest_is_passed_over_loudly(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, make(5), keep=2)
    path = save(tmp_path, make(10), keep=2) / name
    data = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(data[:-20])
    elif damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "zero":
        path.write_bytes(bytes(len(data)))
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    with caplog.at_level(logging.WARNING):
        found = load_latest(tmp_path)
    assert found is not None
    assert found.progress.step == 5
    assert "step-000010" in caplog.text
    assert "going back to the one before it" in caplog.text


def test_no_flipped_bit_is_loaded(tmp_path: Path) -> None:
    path = save(tmp_path, make(5), keep=1)
    files = sorted(path.iterdir())
    moments = random.Random(0)
    for _ in range(200):
        file = moments.choice(files)
        data = file.read_bytes()
        at = moments.randrange(len(data))
        file.write_bytes(data[:at] + bytes([data[at] ^ (1 << moments.randrange(8))]) + data[at + 1 :])
        with pytest.raises(CorruptError):
            checkpoints.load(path)
        file.write_bytes(data)
    checkpoints.load(path)


def test_all_are_damaged(tmp_path: Path) -> None:
    for step in (5, 10):
        (save(tmp_path, make(step), keep=2) / "state.json").write_bytes(b"{}")
    with complains(CorruptError, "step-000010", "step-000005"):
        load_latest(tmp_path)


def test_a_killed_save_leaves_the_one_before(tmp_path: Path) -> None:
    save(tmp_path, make(5), keep=2)
    left = tmp_path / ".step-000010.1f-12345678.tmp"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    found = load_latest(tmp_path)
    assert found is not None and found.progress.step == 5
    assert left.exists()  # it may be another process's, at work: who holds the run's lock sweeps


def test_what_is_no_checkpoint_is_passed_over(tmp_path: Path) -> None:
    path = save(tmp_path, make(5), keep=9)
    (tmp_path / "step-000009.bad").mkdir()
    (tmp_path / "step-000010").write_bytes(b"a file")
    path.rename(tmp_path / "step-000007")
    with complains(CorruptError, "step-000007"):
        load_latest(tmp_path)


def test_a_full_disk_keeps_the_one_before(tmp_path: Path) -> None:
    save(tmp_path, make(5), keep=1)
    with files_no_longer_than(1000), pytest.raises(DiskError, match="cannot be written"):
        save(tmp_path, make(10), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000005"]
    found = load_latest(tmp_path)
    assert found is not None and found.progress.step == 5


def test_one_that_goes_while_it_is_read_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The trainer beside us saves a newer one and removes the one that is being read."""
    checkpoints.save(tmp_path, make(5), keep=1)
    whole = checkpoints.load

    def overtaken(path: Path) -> checkpoints.Checkpoint:
        if checkpoints.step_of(path) == 5:
            checkpoints.save(tmp_path, make(6), keep=1)
        return whole(path)

    monkeypatch.setattr(checkpoints, "load", overtaken)
    found = checkpoints.load_latest(tmp_path)
    assert found is not None and found.progress.step == 6
    assert not caplog.records


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EMFILE, errno.ENOMEM])
@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "SHA256SUMS", "best.json", ""])
def test_what_cannot_be_read_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, name: str
) -> None:
    """The newest may be right: the run never goes back to the one before it, nor does it begin again."""
    for step in (5, 10):
        save(tmp_path, make(step, Best(5, 2.5, 640)), keep=2)
    mark_best(tmp_path, Best(5, 2.5, 640))
    before = tree(tmp_path)
    closed = tmp_path / name if name in ("best.json", "") else tmp_path / "step-000010" / name

    def refusing(function: Any) -> Any:  # root may read everything
        def opened(path: Any, *arguments: Any, **options: Any) -> Any:
            if Path(path) == closed:
                raise OSError(number, os.strerror(number), str(path))
            return function(path, *arguments, **options)

        return opened

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refusing(os.open))
        patched.setattr(Path, "read_bytes", refusing(Path.read_bytes))
        patched.setattr(Path, "iterdir", refusing(Path.iterdir))
        with pytest.raises((HostError, DiskError), match=f"cannot be (read|opened): {os.strerror(number)}"):
            load_best(tmp_path)
    assert tree(tmp_path) == before
    found = load_latest(tmp_path)
    assert found is not None and found.step == 10


def test_a_file_that_is_missing_is_damage(tmp_path: Path) -> None:
    for step in (5, 10):
        save(tmp_path, make(step), keep=2)
    (tmp_path / "step-000010" / "model.safetensors").unlink()
    found = load_latest(tmp_path)
    assert found is not None and found.step == 5


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o027, 0o077])
def test_its_files_are_made_by_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        save(tmp_path, make(5), keep=1)
        mark_best(tmp_path, Best(5, 2.5, 640))
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 5
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}
