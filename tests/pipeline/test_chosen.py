"""What evaluate, sample and export are asked for: this checkpoint and no other in its place, and several texts."""

import json
import shutil
from pathlib import Path

import pytest
from harness import run, states


@pytest.fixture(scope="module")
def home(tiny_toml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    lengths = ("train.steps=6", "train.eval_every=2", "train.checkpoint_every=2", "train.keep_checkpoints=3")
    run("train", tiny_toml, "--home", home, *(word for each in lengths for word in ("--set", each)))
    return home


def step(home: Path, *options: object) -> int:
    return int(json.loads(run("evaluate", "tiny", "--json", "--home", home, *options).stdout)["step"])


def test_the_one_that_is_asked_for(home: Path) -> None:
    checkpoints = home / "runs" / "tiny" / "checkpoints"
    best = json.loads((checkpoints / "best.json").read_text())["step"]
    assert step(home) == step(home, "--checkpoint", "newest") == 6
    assert step(home, "--checkpoint", 2) == step(home, "--checkpoint", checkpoints / "step-000002") == 2
    assert step(home, "--checkpoint", "best") == step(home, "--best") == best
    asked = ("sample", "tiny", "--home", home, "--tokens", 32, "--temperature", 0)
    texts = {each: run(*asked, "--checkpoint", each).stdout for each in (2, 6)}
    assert run(*asked).stdout == texts[6] != texts[2]
    assert "step 4" in run("export", "tiny", "--format", "hf", "--checkpoint", 4, "--home", home).stderr


@pytest.mark.parametrize("missing", ["3", "00", "older", "9" * 40, "9" * 5000])
def test_one_that_is_not_there(home: Path, missing: str) -> None:
    states(run("sample", "tiny", "--home", home, "--checkpoint", missing, code=1).stderr, "no checkpoint", "2, 4, 6")


def test_one_that_is_damaged(home: Path, tmp_path: Path) -> None:
    """The one before it is not taken in its place: another was not asked for."""
    mine = Path(shutil.copytree(home, tmp_path / "home"))
    weights = mine / "runs" / "tiny" / "checkpoints" / "step-000004" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    found = run("sample", "tiny", "--home", mine, "--checkpoint", 4, code=4).stderr
    states(found, str(weights), "--checkpoint", "2, 6")


def test_several_texts(home: Path) -> None:
    asked = ("sample", "tiny", "--home", home, "--tokens", 12)
    each = [run(*asked, "--seed", seed).stdout for seed in (5, 6)]
    assert run(*asked, "--seed", 5, "--count", 2).stdout == f"[seed 5]\n{each[0]}[seed 6]\n{each[1]}"
    assert each[0] != each[1]
