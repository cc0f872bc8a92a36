"""A run's folder: how it begins, what it was made with, and what can be asked of it afterwards."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from pipeline import config, receipt
from pipeline.config import Recipe
from pipeline.layout import Layout, RunPaths
from shards.atomic import make_folder, move, publish_bytes
from shards.errors import ConfigError, CorruptError, DiskError, HostError, RefusedError
from shards.fingerprint import Difference, differences, fingerprint, identity
from shards.manifest import Manifest, decode, encode
from train.config import DeviceName, neutral_tables

if TYPE_CHECKING:  # torch is loaded by what needs it
    from train.job import Job

logger = logging.getLogger(__name__)
MAX_NAME = 60


class PinnedFolder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A token folder, how many of its parts a run sees, whatever it grows to, and its weight in a mixture."""

    folder: str
    fingerprint: str
    parts: int
    weight: float = 1.0


class Pinned(PinnedFolder, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """tokens.json of a run: its token folder, and the `others` of a mixture."""

    others: tuple[PinnedFolder, ...] = ()

    @property
    def each(self) -> tuple[PinnedFolder, ...]:
        """All of them."""
        return (self, *self.others)


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


def pin(weights: Mapping[Path, float]) -> Pinned:
    """The token folders as they are now, each with its weight; that of a single one means nothing."""
    first, *others = (_pin(folder, weight if len(weights) > 1 else 1.0) for folder, weight in weights.items())
    return Pinned(**msgspec.structs.asdict(first), others=tuple(others))


def pinned(run: RunPaths) -> Pinned:
    """The token folders as they were when the run began."""
    try:
        return decode(run.tokens.read_bytes(), Pinned, run.tokens)
    except (OSError, CorruptError) as error:
        raise CorruptError(
            f"{run.tokens}: cannot be read: {error if isinstance(error, OSError) else error.what}",
            "it says which tokens the run was started on",
            f"restore it, or start the run over: --name {run.root.name} --fresh",
        ) from error


def begin(run: RunPaths, recipe: Recipe, pinned: Pinned) -> None:
    """Make the run's folder: what it is trained on, then the recipe, whose presence says that the run exists."""
    make_folder(run.root)
    publish_bytes(run.tokens, encode(pinned))
    config.save(recipe, run.recipe)


def existing(layout: Layout, name: str) -> RunPaths:
    """The run's paths; ConfigError that lists the runs there are when there is none of that name."""
    run = layout.run(checked_name(name))
    if not run.recipe.exists():
        names = sorted(path.parent.name for path in layout.runs.glob("*/run.toml"))
        raise ConfigError(
            f"no run {name!r} under {layout.runs}",
            f"there are: {', '.join(names) or 'none yet'}",
            f"millpond train CONFIG --name {name}",
        )
    return run


def set_aside(run: RunPaths) -> Path:
    """Give the run's folder a free name, `NAME.1` and so on, and return where it is: starting over loses nothing."""
    number = 1
    while (aside := run.root.with_name(f"{run.root.name}.{number}")).exists():
        number += 1
    move(run.root, aside)
    return aside


def identity_of(recipe: Recipe, pinned: Pinned) -> dict[str, Any]:
    """All that can change what the run learns. The corpus and its options are in the token folder's fingerprint."""
    mix = {"tokens.mix": {one.folder: one.weight for one in pinned.each}}
    return {
        **(mix if pinned.others else {"token_folder": pinned.folder}),
        "model": identity(recipe.model),
        "optim": identity(recipe.optim),
        "train": identity(recipe.train),
    }


def refuse_drift(run: RunPaths, wanted: dict[str, Any]) -> None:
    """RefusedError, with the fields that differ, unless the run was made with what is wanted now."""
    found = differences(identity_of(config.load_run(run.recipe), pinned(run)), wanted, neutral_tables())
    if found:
        raise RefusedError(
            f"run {run.root.name} exists and was made with another recipe:\n" + "\n".join(map(str, found)),
            "going on with other settings would be neither the one run nor the other",
            _as_before(found)
            + "--name OTHER for a new run, or --fresh to start this one over (what it has is set aside)",
        )


def job(layout: Layout, run: RunPaths, recipe: Recipe, pinned: Pinned) -> "Job":
    """What the trainer needs to know of a run. RefusedError when a token folder is another one of the same name."""
    from train.job import Job
    from train.sources import Source

    for one in pinned.each:
        folder = layout.tokens / one.folder
        if (found := Manifest.read(folder).fingerprint) != one.fingerprint:
            raise RefusedError(
                f"{folder}: its fingerprint is {found[:12]}…, the run was started on {one.fingerprint[:12]}…",
                "it was replaced by another corpus or tokenizer: the same ids would stand for other text",
                f"bring back what was there, or start over: --name {run.root.name} --fresh",
            )
    wanted = identity_of(recipe, pinned)
    return Job(
        recipe=fingerprint(wanted),
        identity=wanted,
        model=recipe.model,
        optim=recipe.optim,
        train=recipe.train,
        sources=tuple(Source(layout.tokens / one.folder, one.parts, one.weight) for one in pinned.each),
        checkpoints=run.checkpoints,
        metrics=run.metrics,
        samples=run.samples,
        fits=layout.fits,
    )


def evaluate(
    layout: Layout, name: str, tokens: int, *, best: bool = False, device: DeviceName | None = None
) -> dict[str, Any]:
    """The newest (or `best`) checkpoint's loss on the first `tokens` of validation, 0 for all, as evaluation.json.

    `device` is the run's own, train.device, if none is given.
    """
    from train.device import autocast, pick_device, resolve_precision
    from train.fitting import best_fit
    from train.sources import OpenSources
    from train.trained import load_trained

    run = existing(layout, name)
    wanted = job(layout, run, config.load_run(run.recipe), pinned(run))
    layout.keep_compiled()
    place = pick_device(device or wanted.train.device)
    precision = resolve_precision(wanted.train, place)
    sources = OpenSources(wanted.sources, wanted.model.seq_len)
    for shard in (shard for folder in sources.folders for shard in folder.shards("val")):
        shard.check_tokens()
    vocab_size = sources.tokenizer.vocab_size
    trained = load_trained(wanted, vocab_size, place, best=best)
    began = time.perf_counter()
    fit = best_fit(wanted.model, wanted.optim, wanted.train, vocab_size, place, wanted.fits)
    found = sources.measure(
        trained.model,
        tokens,
        fit.eval_batch,
        lambda: autocast(place, precision),
        document_mask=wanted.train.document_mask,
    )
    result: dict[str, Any] = {
        "run": name,
        "step": trained.step,
        "token_folder": ", ".join(source.folder.name for source in wanted.sources),
        "seq_len": wanted.model.seq_len,
        **found.row(),
    }
    asked = {key: result[key] for key in ("run", "step", "token_folder", "val_tokens")}
    try:
        receipt.write(run.evaluation, "evaluate", fingerprint(asked), result, time.perf_counter() - began)
    except (DiskError, HostError) as error:
        logger.warning("%s", error)  # the answer itself is not lost: a run on a disk of somebody else's may be asked
    return result


def sample(
    layout: Layout,
    name: str,
    prompt: str,
    tokens: int,
    temperature: float,
    seed: int,
    *,
    best: bool = False,
    device: DeviceName | None = None,
) -> str:
    """Text from the newest checkpoint, or from the `best`. `device` is the run's own if none is given."""
    from shards.reader import TokenFolder
    from train.device import pick_device
    from train.sample import generate
    from train.trained import load_trained

    run = existing(layout, name)
    wanted = job(layout, run, config.load_run(run.recipe), pinned(run))
    place = pick_device(device or wanted.train.device)
    first = wanted.sources[0]
    tokenizer = TokenFolder(first.folder, parts=first.parts).tokenizer
    trained = load_trained(wanted, tokenizer.vocab_size, place, best=best)
    return generate(trained.model, tokenizer, prompt, tokens, temperature=temperature, seed=seed)


def _as_before(found: list[Difference]) -> str:
    """The settings with which the run resumes; nothing where it was made from other tokens."""
    if any(each.before is None or not each.field.startswith(("model.", "optim.", "train.")) for each in found):
        return ""
    words = {
        each.field: each.before if isinstance(each.before, str) else msgspec.json.encode(each.before).decode()
        for each in found
    }
    return " ".join(f"--set {field}={word}" for field, word in words.items()) + " to resume it, "


def _pin(folder: Path, weight: float) -> PinnedFolder:
    manifest = Manifest.read(folder)
    parts = len(manifest.parts)
    return PinnedFolder(folder=folder.name, fingerprint=manifest.fingerprint, parts=parts, weight=weight)
