"""The README tells the truth where a test can see it: its commands parse, its links lead somewhere."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from pipeline.cli.main import main
from pipeline.config import load
from prepare.text.formats import COMPRESSED, FORMATS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PREPARING = (ROOT / "docs" / "preparing.md").read_text() + (ROOT / "docs" / "sharing.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README + PREPARING, re.DOTALL)


def commands(program: str) -> list[list[str]]:
    lines = [line for _, block in BLOCKS for line in block.splitlines() if line.startswith(f"{program} ")]
    lines += re.findall(rf"`({program} [^`]+)`", README)
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.mark.parametrize("arguments", commands("millpond"), ids=" ".join)
def test_every_command_parses(arguments: list[str]) -> None:
    verb, rest = main.commands[arguments[0]], arguments[1:]
    if isinstance(verb, click.Group):
        verb, rest = verb.commands[rest[0]], rest[1:]
    with verb.make_context(verb.name, rest) as context:
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
    shards = main.commands["shards"]
    assert isinstance(shards, click.Group)
    for verb in shards.commands:
        assert f"millpond shards {verb}" in PREPARING, verb


def test_every_setting_is_a_field() -> None:
    """Those in the tables of docs/preparing.md."""
    for setting in re.findall(r"`'?((?:corpus|tokens)\.\w+=[^`']+)", PREPARING):
        if not setting.startswith(("corpus.kind=hub", "corpus.name")):
            load("demo", (setting,))


def test_every_format_is_named() -> None:
    """In docs/preparing.md, with what each needs."""
    (paragraph,) = (text for text in PREPARING.split("\n\n") if text.startswith("Text is read from"))
    assert set(re.findall(r"`(\.\w+)`", paragraph)) == {*FORMATS, *COMPRESSED}


def test_the_recipe_loads(tmp_path: Path) -> None:
    (recipe,) = (block for kind, block in BLOCKS if kind == "toml")
    path = tmp_path / "letters.toml"
    path.write_text(recipe)
    assert load(str(path))[1].corpus.name == "letters"


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
    assert len(re.findall(r"\]\(([^)#]+)\)", README)) > 4


def test_it_can_be_read_in_one_sitting() -> None:
    assert len(README.splitlines()) <= 200
    assert max(len(line) for _, block in BLOCKS for line in block.splitlines()) <= 120


def test_the_file_map_names_every_room() -> None:
    rows = [line.split("|") for line in (ROOT / "docs" / "architecture.md").read_text().splitlines() if "/` |" in line]
    said: dict[str, set[str]] = {}
    for row in rows:
        said.setdefault(row[1].strip(" `/"), set()).update(re.findall(r"`(\w+)`", row[2]))
    found: dict[str, set[str]] = {}
    for path in (
        path for package in ("shards", "prepare", "train", "pipeline") for path in (ROOT / package).rglob("*.py")
    ):
        found.setdefault(path.parent.relative_to(ROOT).as_posix(), set()).update({path.stem} - {"__init__"})
    assert {folder: rooms for folder, rooms in said.items() if folder != "tests"} == found


@pytest.mark.parametrize("name", ["folder_statistics", "bigram"])
def test_the_examples_run(tiny_folder: Path, name: str) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py", tiny_folder],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.toml")), ids=lambda path: path.stem)
def test_the_recipes_of_the_examples_load(path: Path) -> None:
    assert load(str(path))[1].train.tokens


def test_the_python_of_the_first_page_runs(tiny_folder: Path) -> None:
    page = (ROOT / "docs" / "getting-started.md").read_text()
    (block,) = (each for each in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "TokenFolder" in each)
    code = block.replace("data/tokens/letters-1a2b3c4d", str(tiny_folder))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_no_table_cell_is_a_paragraph() -> None:
    long = [
        f"{page.name}: {cell}"
        for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "shards" / "FORMAT.md"]
        for line in page.read_text().splitlines()
        if line.startswith("|")
        for cell in re.split(r"(?<!\\)\|", line)
        if len(cell.strip()) > 120
    ]
    assert not long, "\n".join(long)
