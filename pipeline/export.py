"""A run's model in the formats of others, compared with the run's own before it is called done."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from pipeline import config
from pipeline.config import Recipe
from pipeline.home import kept_tokenizer, pins, receipt, runs
from pipeline.home.layout import Layout, RunPaths
from pipeline.home.pins import Pinned
from pipeline.terminal import Terminal
from shards.atomic import locked, make_folder, published_folder, sha256_of, sweep
from shards.errors import RefusedError
from shards.fingerprint import fingerprint, identity
from shards.manifest import MANIFEST, Manifest
from train.telemetry.metrics import read_rows

if TYPE_CHECKING:  # torch is loaded by the verb that needs it
    from train.export.card import CardFacts
    from train.export.hugging_face import DtypeName
    from train.trained import Trained


def export(
    layout: Layout,
    run: RunPaths,
    terminal: Terminal,
    *,
    to: Path | None = None,
    dtype: "DtypeName" = "f32",
    best: bool = False,
    force: bool = False,
) -> Path:
    """The newest (or `best`) checkpoint as the folder `hf` in `to`, or in the run's own export/.

    Nothing is published unless transformers, where it is installed, gives the same ids and logits. RefusedError when
    something else is in that place.
    """
    import torch

    from train.export.check import can_check, check
    from train.export.hugging_face import DTYPES, write
    from train.state.checkpoint import weights_hash
    from train.trained import load_trained

    pinned = pins.pinned(run)
    recipe = config.load_run(run.recipe)
    kept = kept_tokenizer.load(layout, run, pinned)
    trained = load_trained(runs.job(layout, run, recipe, pinned), kept.record, torch.device("cpu"), best=best)
    place = make_folder(to or run.export)
    folder, record = place / "hf", place / "hf.json"
    print_ = fingerprint({"weights": weights_hash(trained.model.state_dict()), "dtype": dtype, "card": 1})
    with locked(place / ".lock"):
        sweep(place)
        known = receipt.read(record, print_)
        if known and not force and _sums(folder) == known.result.get("files"):
            terminal.stage("export", f"{folder}, step {trained.step:,}", done=True)
            return folder
        if folder.exists() and not record.exists() and not force:
            raise RefusedError(
                f"{folder}: is there, and was not made by millpond export",
                "it would be replaced",
                "name another folder with --to, or replace it with --force",
            )
        began, checked = time.perf_counter(), None
        with published_folder(folder) as temp:
            write(trained.model, kept.tokenizer, DTYPES[dtype], temp)
            if can_check():
                terminal.note("comparing it with the model in transformers")
                checked = check(temp, trained.model, kept.tokenizer, DTYPES[dtype])
            said = "Not compared with the model it was made from: transformers was not installed."
            if checked:
                said = f"transformers gives the same ids, and logits that differ by at most {checked[0]:.1g}, on "
                said += f"{checked.texts} texts."
            _write_card(temp, _facts(layout, run, recipe, pinned, trained, said))
        numbers = {"step": trained.step, "dtype": dtype, "files": _sums(folder)}
        numbers |= checked._asdict() if checked else {}
        receipt.write(record, "export", print_, numbers, time.perf_counter() - began)
    terminal.stage("export", f"{folder}, step {trained.step:,}, {time.perf_counter() - began:.1f} s")
    terminal.note(said if checked else f"{said} To compare it: pip install transformers, and export with --force")
    return folder


def _sums(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in sorted(folder.glob("*"))}


def _write_card(folder: Path, facts: "CardFacts") -> None:
    from train.export.card import model_card

    (folder / "README.md").write_text(model_card(facts), "utf-8")


def _facts(
    layout: Layout, run: RunPaths, recipe: Recipe, pinned: Pinned, trained: "Trained", check: str
) -> "CardFacts":
    """What the run's files say of the model; of its tokens what their manifests say, where they are here."""
    from train.export.card import CardFacts
    from train.schedule import Ramp

    paths = [layout.tokens / one.folder for one in pinned.folders]
    corpora = [Manifest.read(path).corpus for path in paths if (path / MANIFEST).exists()]
    details = [corpus.details for corpus in corpora if corpus.kind == "hub"]
    rows = [row for row in read_rows(run.metrics) if row["step"] == trained.step and "val_loss" in row]
    measured: dict[str, Any] = rows[-1] if rows else {}
    progress, model = trained.progress, trained.model
    tables = {table: identity(getattr(recipe, table)) for table in ("model", "optim", "train")}
    return CardFacts(
        name=run.root.name,
        family=recipe.model.family,
        parameters=model.parameter_count(),
        step=trained.step,
        steps=Ramp(recipe.model, recipe.train).steps,
        tokens=progress.tokens,
        val_loss=measured.get("val_loss"),
        val_bpb=measured.get("val_bpb"),
        tokenizer=progress.tokenizer.name if progress.tokenizer else "",
        vocab_size=model.vocab_size,
        seq_len=recipe.model.seq_len,
        corpora=tuple(corpus.name for corpus in corpora) or tuple(path.name for path in paths),
        datasets=tuple((each["repo"], each["commit"]) for each in details),
        licence=", ".join(sorted({each["licence"] for each in details if "licence" in each})),
        hours=progress.seconds / 3600,
        kwh=progress.energy_kwh,
        recipe=tomli_w.dumps({table: _without_none(fields) for table, fields in tables.items()}),
        check=check,
    )


def _without_none(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}
