"""The real Makefile with another program in the place of millpond: what is typed reaches it as it is."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.cli.options import split_settings

ROOT = Path(__file__).parents[2]
ECHO = """#!/usr/bin/env python3
import json, os, sys
print(json.dumps([sys.argv[1:], os.environ.get("MILLPOND_SET", "")]))
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "millpond").write_text(ECHO)
    (tmp_path / ".venv" / "bin" / "millpond").chmod(0o755)
    return tmp_path


def make(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("MAKE", "MFLAGS", "RUN", "CONFIG", "MILLPOND"))
    }
    return subprocess.run(["make", *words], cwd=place, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        ("optim.lr=3e-4", ["optim.lr=3e-4"]),
        ("optim.lr=3e-4  train.steps=9", ["optim.lr=3e-4", "train.steps=9"]),
        ("corpus.filters=int_score >= 4", ["corpus.filters=int_score >= 4"]),
        (
            'corpus.filters=["lang == \\"en\\"", "n > 3"] train.steps=9',
            ['corpus.filters=["lang == \\"en\\"", "n > 3"]', "train.steps=9"],
        ),
        ("'corpus.filters=score > 4' train.steps=9", ["corpus.filters=score > 4", "train.steps=9"]),
        ("corpus.files=/a b/*.txt", ["corpus.files=/a b/*.txt"]),
        ('train.prompts=["it\'s $HOME; `ls` & $(x) \\\\ #1"]', ['train.prompts=["it\'s $HOME; `ls` & $(x) \\\\ #1"]']),
        ("", []),
    ],
)
def test_settings_arrive_as_they_are(place: Path, given: str, settings: list[str]) -> None:
    done = make(place, "train", f"SET={given}")
    assert done.returncode == 0, done.stderr
    arguments, environment = json.loads(done.stdout)
    assert arguments == ["train", "demo", "--name", "demo"]
    assert list(split_settings(environment)) == settings
    assert sorted(path.name for path in place.iterdir()) == [".venv", "Makefile", "constraints.txt", "pyproject.toml"]


def test_a_missing_config_is_found_before_anything_is_installed(place: Path) -> None:
    shutil.rmtree(place / ".venv")
    done = make(place, "train", "CONFIG=missing.toml")
    assert done.returncode != 0
    assert "CONFIG=missing.toml: there is no such file" in done.stderr
    assert not (place / ".venv").exists()


def test_a_config_with_a_space_in_its_name(place: Path) -> None:
    (place / "my recipe.toml").write_text("")
    arguments, _ = json.loads(make(place, "prepare", "CONFIG=my recipe.toml").stdout)
    assert arguments == ["prepare", "my recipe.toml"]


def test_the_newest_run_is_taken_where_none_is_named(place: Path) -> None:
    assert json.loads(make(place, "evaluate").stdout)[0] == ["evaluate"]
    assert json.loads(make(place, "evaluate", "RUN=first").stdout)[0] == ["evaluate", "first"]
    prompt = 'it\'s "$HOME" & `ls`'
    assert json.loads(make(place, "sample", f"PROMPT={prompt}").stdout)[0] == ["sample", "--prompt", prompt]
