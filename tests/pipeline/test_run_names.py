"""How a run is named: by its name, by its path, or not at all; and what is said when there is none of that name."""

import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pipeline.cli.main import main


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 2 and result.stdout == "", (result.stderr, result.exception)
    return result.stderr


@pytest.fixture(scope="module")
def home(tiny_toml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home whose runs are `first` and, trained after it, `second`."""
    home = tmp_path_factory.mktemp("work") / "data"
    for name, steps in (("first", 2), ("second", 3)):
        done = run("train", tiny_toml, "--home", home, "--name", name, "--set", f"train.steps={steps}")
        assert done.exit_code == 0, done.stderr
    return home


@pytest.fixture
def beside(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder is the one with `data` in it, which is the default home."""
    monkeypatch.chdir(home.parent)
    return home


@pytest.mark.parametrize("path", ["data/runs/first", "./data/runs/first/", "data/runs/../runs/first/run.toml"])
def test_a_path_is_taken_as_the_run_it_is(beside: Path, path: str) -> None:
    found = run("evaluate", path, "--tokens", 64, "--json")
    assert found.exit_code == 0, found.stderr
    assert json.loads(found.stdout)["run"] == "first"


def test_a_path_brings_its_own_home(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("evaluate", home / "runs" / "first", "--tokens", 64).exit_code == 0
    monkeypatch.chdir(home / "runs")
    assert run("evaluate", "first", "--tokens", 64).exit_code == 0
    monkeypatch.chdir(home / "runs" / "first")
    assert run("sample", ".", "--tokens", 2).exit_code == 0
    assert not list(tmp_path.iterdir())


def test_a_run_that_lies_in_no_home(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "runs" / "first", tmp_path / "a copy")
    assert run("sample", tmp_path / "a copy", "--tokens", 2).stdout.startswith("The")
    assert run("evaluate", tmp_path / "a copy", "--tokens", 64, "--home", home).exit_code == 0
    shutil.copytree(home / "runs" / "first", tmp_path / "backup" / "runs" / "first")  # a home without tokens
    assert run("evaluate", tmp_path / "backup" / "runs" / "first", "--tokens", 64, "--home", home).exit_code == 0


def test_any_name_that_a_run_has(home: Path, tmp_path: Path) -> None:
    """Starting over gives a name with .1 at its end, which may be longer than one that may be chosen."""
    name = "x" * 60 + ".1"
    shutil.copytree(home / "runs" / "first", tmp_path / "runs" / name)
    assert run("sample", name, "--tokens", 2, "--home", tmp_path).stdout.startswith("The")


def test_the_newest_run_is_the_default_and_is_named(beside: Path) -> None:
    for newest in ("second", "first"):
        os.utime(beside / "runs" / newest / "metrics.jsonl")
        found = run("evaluate", "--tokens", 64, "--json")
        assert json.loads(found.stdout)["run"] == newest
        assert found.stderr.strip() == f"{newest} is the newest run"


@pytest.mark.parametrize("verb", ["sample", "evaluate"])
@pytest.mark.parametrize(("name", "meant"), [("frist", "first"), ("secnd", "second"), ("Second", "second")])
def test_a_mistyped_name(beside: Path, verb: str, name: str, meant: str) -> None:
    assert refused(verb, name).splitlines() == [
        f"error: no run {name!r} under {beside}/runs",
        f"did you mean {meant}? there are: first, second",
        "hint: name another home with --home DIR or MILLPOND_HOME",
    ]


def test_a_name_that_is_like_no_other(beside: Path) -> None:
    said = refused("sample", "zzz")
    assert "there are: first, second\n" in said and "did you mean" not in said and "train" not in said


@pytest.mark.parametrize("path", ["data/runs/frist", "./data/runs/frist/", "data/runs/frist/run.toml"])
def test_a_mistyped_path(beside: Path, path: str) -> None:
    said = refused("sample", path)
    assert f"error: no run {path!r} under {beside}/runs\ndid you mean first? there are: first, second\n" in said


@pytest.mark.parametrize("name", ["../up", ".hidden", "späti", "x" * 61, "x" * 300, "", "tiny.toml"])
def test_advice_names_only_what_the_verb_has(beside: Path, name: str) -> None:
    said = refused("sample", name)
    assert "--home DIR" in said and "--name" not in said.replace("train CONFIG --name RUN", "")
    assert "Traceback" not in said


@pytest.mark.parametrize("asked", [("sample",), ("evaluate",), ("sample", "first")])
def test_from_another_folder(asked: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = refused(*asked)
    assert f"under {tmp_path}/data/runs" in said and "--home DIR or MILLPOND_HOME" in said
    found = run("status").stdout
    assert found.startswith(f"nothing under {tmp_path}/data yet\n") and "--home DIR or MILLPOND_HOME" in found
    assert not list(tmp_path.iterdir())
