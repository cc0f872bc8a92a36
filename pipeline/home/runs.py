"""A run's folder: how it begins, what it was made with, and what can be asked of it afterwards."""

import difflib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from pipeline import config
from pipeline.config import Recipe
from pipeline.home import kept_tokenizer
from pipeline.home.layout import Layout, RunPaths
from pipeline.home.pins import Pinned, pinned
from shards.atomic import make_folder, move, publish_bytes
from shards.errors import ConfigError, RefusedError
from shards.fingerprint import Difference, differences, fingerprint, identity
from shards.manifest import MANIFEST, Manifest, encode
from train.config import neutral_tables

if TYPE_CHECKING:  # torch is loaded by what needs it
    from train.job import Job

MAX_NAME = 60
_FIRST = "millpond train CONFIG --name RUN makes one"
_OTHER_HOME = "name another home with --home DIR or MILLPOND_HOME"


class Begun(msgspec.Struct, frozen=True):
    """A run as the process that leads it tells it to those that train with it."""

    pinned: Pinned
    recipe: Recipe


def checked_name(name: str) -> str:
    """`name`, if it can be a folder's name everywhere; ConfigError otherwise."""
    letters = name.translate({ord(mark): None for mark in "-_."})
    if not (letters.isascii() and letters.isalnum()) or name.startswith(".") or len(name) > MAX_NAME:
        raise ConfigError(
            f"run name {name!r}: letters, digits, '.', '-' and '_' only, {MAX_NAME} at most",
            "it is the name of a folder",
            "choose another with --name RUN",
        )
    return name


def begin(layout: Layout, run: RunPaths, recipe: Recipe, pinned: Pinned) -> None:
    """Make the run's folder: its tokenizer, what it is trained on, then the recipe, which says that the run exists."""
    make_folder(run.root)
    kept_tokenizer.keep(run, layout.tokens / pinned.folder)
    publish_bytes(run.tokens, encode(pinned))
    config.save(recipe, run.recipe)


def find(layout: Layout, asked: str | None) -> tuple[Layout, RunPaths]:
    """A run by its name under the home or by its path, the newest run for None; and its home.

    The home is the run's own if that has tokens, else `layout`: a run can be copied without its tokens.

    ConfigError, with the name that may be meant and the home that was looked in, when there is no such run.
    """
    if asked is None:
        return layout, _newest(layout)
    is_name = Path(asked).name == asked != ".."
    if is_name and _exists(run := layout.run(asked)):
        return layout, run
    path = Path(os.path.abspath(asked))  # noqa: PTH100  (Path.absolute keeps "..")
    run = RunPaths(path.parent if path.name == RunPaths(path).recipe.name else path)
    if _exists(run):
        own = Layout(run.root.parent.parent)
        is_its_own = own.runs == run.root.parent and own.tokens.exists()
        return own if is_its_own else layout, run
    place = layout.runs.absolute() if is_name else run.root.parent
    names = _names(place)
    near = difflib.get_close_matches(run.root.name, names, n=1, cutoff=0.5)
    raise ConfigError(
        f"no run {asked!r} under {place}",
        f"did you mean {near[0]}? there are: {', '.join(names)}" if near else _there_are(names),
        _OTHER_HOME if names else f"{_FIRST}, or {_OTHER_HOME}",
    )


def _exists(run: RunPaths) -> bool:
    try:
        return run.recipe.is_file()
    except OSError:  # a name that is too long for a file
        return False


def _newest(layout: Layout) -> RunPaths:
    """The run that was trained last."""
    names = _names(layout.runs)
    if not names:
        raise ConfigError(f"no run under {layout.runs.absolute()} yet", "", f"{_FIRST}, or {_OTHER_HOME}")
    return max((layout.run(name) for name in names), key=_trained_at)


def _trained_at(run: RunPaths) -> int:
    return max(path.stat().st_mtime_ns for path in (run.recipe, run.metrics) if path.exists())


def _names(place: Path) -> list[str]:
    return sorted(path.parent.name for path in place.glob("*/run.toml"))


def _there_are(names: list[str]) -> str:
    return f"there are: {', '.join(names) or 'none yet'}"


def set_aside(run: RunPaths) -> Path:
    """Give the run's folder a free name, `NAME.1` and so on, and return where it is: starting over loses nothing."""
    number = 1
    while (aside := run.root.with_name(f"{run.root.name}.{number}")).exists():
        number += 1
    move(run.root, aside)
    return aside


def as_begun(run: RunPaths, recipe: Recipe) -> Recipe:
    """The recipe with the schedule's arithmetic that the run began with, if there is such a run."""
    if not run.recipe.exists():
        return recipe
    rule = config.load_run(run.recipe).optim.schedule_rule
    return msgspec.structs.replace(recipe, optim=msgspec.structs.replace(recipe.optim, schedule_rule=rule))


def identity_of(recipe: Recipe, pinned: Pinned) -> dict[str, Any]:
    """All that can change what the run learns. The corpus and its options are in the token folder's fingerprint."""
    mix = {"tokens.mix": {one.folder: one.weight for one in pinned.folders}}
    return {
        **(mix if pinned.others else {"token_folder": pinned.folder}),
        "model": identity(recipe.model),
        "optim": identity(recipe.optim),
        "train": identity(recipe.train),
    }


def refuse_drift(run: RunPaths, wanted: dict[str, Any]) -> None:
    """RefusedError, with the fields that differ, unless the run was made with what is wanted now."""
    made = identity_of(config.load_run(run.recipe), pinned(run))
    optim = {key: value for key, value in wanted["optim"].items() if key != "schedule_rule"}  # see as_begun
    optim |= {key: value for key, value in made["optim"].items() if key == "schedule_rule"}
    if found := differences(made, {**wanted, "optim": optim}, neutral_tables()):
        raise drifted(run, found)


def drifted(run: RunPaths, found: Sequence[Difference | str], way_out: str = "") -> RefusedError:
    """Why the run is not the one that is asked for, `found` by line, and the ways out, `way_out` among them."""
    name = run.root.name
    found = [each for each in found if not (isinstance(each, Difference) and each.field == "train.earlier")] or found
    ways = [f"millpond resume {name} resumes it with its own settings", *([way_out] if way_out else [])]
    if longer := _longer(found):
        ways.insert(0, f"millpond resume {name} {longer} makes it longer")
    ways.append("millpond train with --name OTHER starts a new run; with --fresh it starts over and keeps the old one")
    return RefusedError(
        f"run {name} exists and was made with another recipe:\n" + "\n".join(map(str, found)),
        "resuming would mix two different configurations",
        "; ".join(ways),
    )


def _longer(found: Sequence[Difference | str]) -> str:
    """The option that asks for what was found, where that is only a greater length."""
    lengths = {each.field: each for each in found if isinstance(each, Difference)}
    for field in ("train.steps", "train.tokens"):
        if len(lengths) == len(found) == 1 and field in lengths and lengths[field].now > lengths[field].before > 0:
            return f"--{field.removeprefix('train.')} {lengths[field].now}"
    return ""


def require_tokens(layout: Layout, run: RunPaths, pinned: Pinned, verb: str) -> None:
    """RefusedError unless the token folders that the run was started on are in this home, and none is another one."""
    for one in pinned.folders:
        folder = layout.tokens / one.folder
        if not (folder / MANIFEST).exists():
            tokens = config.load_run(run.recipe).tokens
            again = f"millpond prepare {run.recipe} --home {layout.home} makes them again; "
            state = f"whose {MANIFEST} is missing in" if folder.exists() else "which are not in"
            raise RefusedError(
                f"{verb} needs the tokens {one.folder}, {state} this home, {layout.home.absolute()}",
                f"run {run.root.name} was started on them",
                f"millpond shards pull PLACE brings them, from a folder or hf://datasets/OWNER/NAME; "
                f"{'' if tokens.folder or tokens.mix else again}or {_OTHER_HOME}",
            )
        if (found := Manifest.read(folder).fingerprint) != one.fingerprint:
            raise RefusedError(
                f"{folder}: its fingerprint is {found[:12]}…, the run was started on {one.fingerprint[:12]}…",
                "it was replaced by another corpus or tokenizer: the same ids would mean other text",
                f"bring back what was there, or start over: millpond train CONFIG --name {run.root.name} --fresh",
            )


def job(layout: Layout, run: RunPaths, recipe: Recipe, pinned: Pinned) -> "Job":
    """What the trainer needs to know of a run."""
    from train.data.sources import Source
    from train.job import Job

    wanted = identity_of(recipe, pinned)
    return Job(
        recipe=fingerprint(wanted),
        identity=wanted,
        model=recipe.model,
        optim=recipe.optim,
        train=recipe.train,
        sources=tuple(Source(layout.tokens / one.folder, one.parts, one.weight) for one in pinned.folders),
        checkpoints=run.checkpoints,
        metrics=run.metrics,
        samples=run.samples,
        fits=layout.fits,
        earlier=tuple(_earlier(recipe, pinned)),
    )


def _earlier(recipe: Recipe, pinned: Pinned) -> Iterator[tuple[str, int]]:
    """The fingerprints of a run before it was made longer, each with the step up to which it was the run's."""
    for i, length in enumerate(recipe.train.earlier):
        before = {"tokens": length.tokens, "steps": length.steps, "earlier": recipe.train.earlier[:i]}
        train = msgspec.structs.replace(recipe.train, **before)
        yield fingerprint(identity_of(msgspec.structs.replace(recipe, train=train), pinned)), length.until
