"""The README tells the truth where a test can see it: its commands parse, its links lead somewhere."""

import re
import shlex
from pathlib import Path

import click
import pytest

from pipeline.cli import main
from pipeline.config import load

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)


def commands(program: str) -> list[list[str]]:
    lines = [line for _, block in BLOCKS for line in block.splitlines() if line.startswith(f"{program} ")]
    lines += re.findall(rf"`({program} [^`]+)`", README)
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.mark.parametrize("arguments", commands("millpond"), ids=" ".join)
def test_every_command_parses(arguments: list[str]) -> None:
    verb = main.commands[arguments[0]]
    with verb.make_context(arguments[0], arguments[1:]) as context:
        assert isinstance(context, click.Context)


def test_every_make_target_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = {arguments[0] for arguments in commands("make")}
    assert targets >= {"train", "test", "check"}
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_verb_is_shown() -> None:
    for verb in main.commands:
        assert verb in README, verb


def test_the_recipe_loads(tmp_path: Path) -> None:
    (recipe,) = (block for kind, block in BLOCKS if kind == "toml")
    path = tmp_path / "letters.toml"
    path.write_text(recipe)
    assert load(str(path))[1].corpus.name == "letters"


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 4
    for link in links:
        assert (ROOT / link).exists(), link


def test_it_can_be_read_in_one_sitting() -> None:
    assert len(README.splitlines()) <= 200
    assert max(len(line) for _, block in BLOCKS for line in block.splitlines()) <= 120


def test_the_file_map_names_every_room() -> None:
    for package in ("shards", "prepare", "train", "pipeline"):
        row = next(line for line in README.splitlines() if line.startswith(f"| `{package}/`"))
        for name in re.findall(r"`(\w+)`", row):
            assert (ROOT / package / f"{name}.py").exists(), f"{package}/{name}.py"
