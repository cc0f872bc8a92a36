"""A training whose disk is full, read-only or too small: found before step 0, or nothing lost and the way out said."""

import re
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import command, complains, millpond
from test_disk_full import disk, mount  # noqa: F401
from training import trained

from shards import DiskError
from train.config import ModelConfig, OptimConfig, TrainConfig
from train.data.sources import Source
from train.events import Event, Saved
from train.job import Job
from train.state.checkpoint import load_latest, steps
from train.telemetry.metrics import read_rows

STEPS = ("--set", "train.steps=12", "--set", "train.checkpoint_every=2")


def job(tokens: Path, root: Path, checkpoints: Path) -> Job:
    return Job(
        recipe="00" * 32,
        model=ModelConfig(n_layer=1, n_head=2, d_model=32, seq_len=32),
        optim=OptimConfig(),
        train=TrainConfig(
            steps=16,
            batch_tokens=256,
            eval_tokens=640,
            final_eval_tokens=960,
            checkpoint_every=2,
            eval_every=0,
            keep_checkpoints=1,
        ),
        sources=(Source(tokens, 5),),
        checkpoints=checkpoints,
        metrics=root / "metrics.jsonl",
        samples=root / "samples.jsonl",
    )


def losses(run: Job) -> list[tuple[int, float | None, float | None]]:
    return [(row["step"], row.get("loss"), row.get("val_loss")) for row in read_rows(run.metrics)]


def prepared(toml: Path, home: Path) -> None:
    assert millpond("prepare", toml, "--home", home).returncode == 0


def test_a_disk_that_fills_up_while_saving(
    tiny_folder: Path,
    tmp_path: Path,
    disk: Callable[[str], Path],  # noqa: F811
) -> None:
    (tmp_path / "calm").mkdir()
    calm = job(tiny_folder, tmp_path / "calm", tmp_path / "calm" / "checkpoints")
    right = trained(calm)
    nbytes = sum(file.stat().st_size for file in steps(calm.checkpoints)[-1].iterdir())

    full = disk("size=64m")
    wanted = job(tiny_folder, tmp_path, full / "checkpoints")

    def fill(event: Event) -> None:
        if isinstance(event, Saved) and event.step == 8:
            disk(f"size={nbytes * 3 // 2}")  # there is the newest one, and half of the next fits

    with complains(DiskError, "step-000010") as caught:
        trained(wanted, fill)
    assert caught.value.exit_code == 5
    assert "what was finished before is kept" in str(caught.value) and "free some space" in str(caught.value)
    assert [path.name for path in wanted.checkpoints.iterdir() if path.name.startswith(".")] == []
    found = load_latest(wanted.checkpoints)
    assert found is not None and found.step == 8

    disk("size=64m")
    assert trained(wanted) == right
    assert losses(wanted) == losses(calm)


@pytest.mark.slow
def test_a_disk_too_small_is_found_before_step_0(
    tiny_toml: Path,
    disk: Callable[[str], Path],  # noqa: F811
) -> None:
    home = disk("size=64m")
    prepared(tiny_toml, home)
    used = int(subprocess.run(["du", "-sB1", home], capture_output=True, text=True, check=True).stdout.split()[0])
    disk(f"size={used + 100_000}")
    done = millpond("train", tiny_toml, "--home", home, *STEPS)
    assert done.returncode == 5, done.stderr
    assert re.search(r"runs/tiny/checkpoints: checkpoints need about [\d,]+ bytes and [\d,]+ are free", done.stderr)
    assert "train.keep_checkpoints=1" in done.stderr
    assert not (home / "runs").exists()
    disk("size=64m")
    assert millpond("train", tiny_toml, "--home", home, *STEPS).returncode == 0


@pytest.mark.slow
def test_a_run_folder_where_nothing_can_be_written(
    tiny_toml: Path,
    tmp_path: Path,
    disk: Callable[[str], Path],  # noqa: F811
) -> None:
    """Not even root can: it is a read-only mount over the run's folder."""
    disk("size=1m")
    home = tmp_path / "home"
    assert millpond("train", tiny_toml, "--home", home, *STEPS, "--max-hours", "1e-6").returncode == 75
    run = home / "runs" / "tiny"
    mount("--bind", run, run)
    try:
        mount("-o", "remount,bind,ro", run)
        before = (run / "metrics.jsonl").read_bytes()
        done = millpond("train", tiny_toml, "--home", home, *STEPS)
        assert done.returncode == 3, done.stderr
        assert "Traceback" not in done.stderr and "make it writable" in done.stderr
        assert (run / "metrics.jsonl").read_bytes() == before
    finally:
        subprocess.run(["umount", str(run)], check=True)
    assert millpond("train", tiny_toml, "--home", home, *STEPS).returncode == 0


@pytest.mark.slow
def test_files_that_may_not_grow(tiny_toml: Path, tmp_path: Path) -> None:
    """EFBIG, as from a quota, by the command itself."""
    prepared(tiny_toml, tmp_path)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))

    done = subprocess.run(
        command("train", tiny_toml, "--home", tmp_path, *STEPS),
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit,
    )
    assert done.returncode == 5, done.stderr
    assert "cannot be written: " in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("runs/tiny/checkpoints/*"))
    assert millpond("train", tiny_toml, "--home", tmp_path, *STEPS).returncode == 0
