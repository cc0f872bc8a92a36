"""The same command line, started by torchrun: one process speaks and writes, all end together."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from harness import litter, tree

from train.telemetry.metrics import read_rows

LONGEST = 120.0


def torchrun(*arguments: object) -> "subprocess.Popen[str]":
    """millpond in two processes, on the CPU."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    return subprocess.Popen(
        [*launch, "pipeline.cli.main", *map(str, arguments), "--set", "train.device=cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def ended(process: "subprocess.Popen[str]") -> str:
    """Everything that was printed, once it has ended."""
    try:
        return process.communicate(timeout=LONGEST)[0]
    finally:
        process.kill()


def until_step(step: int, metrics: Path, process: "subprocess.Popen[str]") -> None:
    while process.poll() is None and not any(row["step"] >= step for row in read_rows(metrics)):
        time.sleep(0.01)


def test_from_text_to_samples_and_again(tiny_toml: Path, tmp_path: Path) -> None:
    options = ("train", tiny_toml, "--home", tmp_path, "--set", "train.steps=12")
    first = torchrun(*options)
    log = ended(first)
    assert first.returncode == 0, log
    lines = log.splitlines()
    for start, times in (("tokenize ", 1), ("train ", 1), ("tiny: 12 steps", 1), ("     1/12", 1), ("    12/12", 1)):
        assert sum(line.startswith(start) for line in lines) == times, log
    assert "(2 processes x 1 x 4 x 32)" in log
    assert [row["step"] for row in read_rows(tmp_path / "runs" / "tiny" / "metrics.jsonl")] == [
        0,
        *range(1, 13),
        12,
        12,
    ]
    assert not litter(tmp_path)
    before = tree(tmp_path)
    again = torchrun(*options)
    log = ended(again)
    assert again.returncode == 0, log
    assert log.count("train     tiny  12 steps") == log.count("already done") - 3 == 1, log
    assert tree(tmp_path) == before


@pytest.mark.slow
def test_what_is_wrong_is_said_once(tiny_toml: Path, tmp_path: Path) -> None:
    """What both find, and what rank 0 alone finds while the other waits for it."""
    nonsense = ("--set", "train.batch_tokens=96"), "2 processes cannot share 3 sequences"
    missing = ("--set", "corpus.files=nowhere.jsonl"), "no file matches 'nowhere.jsonl'"
    for setting, says in (nonsense, missing):
        process = torchrun("train", tiny_toml, "--home", tmp_path, *setting)
        log = ended(process)
        assert process.returncode != 0
        assert log.count(says) == log.count("error: ") == 1, log


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["torchrun", "rank 1"])
def test_stopped_and_run_again(tiny_toml: Path, tmp_path: Path, whom: str) -> None:
    """By SIGTERM to torchrun: saved. By SIGKILL to one of the ranks: all end, and the next one goes on from before."""
    options = ("train", tiny_toml, "--home", tmp_path, "--set", "train.steps=120", "--set", "train.eval_every=0")
    run = tmp_path / "runs" / "tiny"
    process = torchrun(*options)
    until_step(15, run / "metrics.jsonl", process)
    if whom == "torchrun":
        process.send_signal(signal.SIGTERM)
    else:
        victim = next(child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "1")
        victim.kill()
    log = ended(process)
    assert process.returncode != 0
    saved = max(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))
    if whom == "torchrun":
        assert saved == read_rows(run / "metrics.jsonl")[-1]["step"]
        assert log.count(f"saved at step {saved} of 120") == 1, log
        assert log.count("saving after this step") == 1, log
    assert saved >= 10
    again = torchrun(*options)
    log = ended(again)
    assert again.returncode == 0, log
    assert f"resumes at step {saved} of" in log
    steps = [row["step"] for row in read_rows(run / "metrics.jsonl") if "loss" in row]
    assert steps == list(range(1, 121))
    assert not litter(tmp_path)
