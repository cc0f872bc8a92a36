"""A run's model in the formats of others, compared with the run's own before it is called done."""

import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, assert_never

from pipeline import config
from pipeline.config import Recipe
from pipeline.home import kept_tokenizer, pins, receipt, runs
from pipeline.home.layout import Layout, RunPaths
from pipeline.home.pins import Pinned
from pipeline.terminal import Terminal
from shards.atomic import locked, make_folder, published_folder, sha256_of, sweep
from shards.errors import HostError, RefusedError
from shards.fingerprint import fingerprint, identity
from shards.manifest import MANIFEST, Manifest
from shards.tokenizer import Tokenizer
from train.telemetry.metrics import read_rows

if TYPE_CHECKING:  # torch is loaded by the verb that needs it
    from train.export.card import CardFacts
    from train.export.gguf_file import GgufType
    from train.model.gpt import Model
    from train.trained import Trained

FormatName = Literal["hf", "gguf"]
FORMATS: tuple[FormatName, ...] = ("hf", "gguf")


def export(
    layout: Layout,
    run: RunPaths,
    terminal: Terminal,
    *,
    to: Path | None = None,
    formats: Sequence[FormatName] = FORMATS,
    dtype: "GgufType | None" = None,
    checkpoint: str = "newest",
    force: bool = False,
) -> list[Path]:
    """The chosen checkpoint as the folders `hf` and `gguf` in `to`, or in the run's own export/.

    `dtype` is of the matrices, by default f32 in `hf` and q8_0 in `gguf`. Nothing is published that differs from the
    model. RefusedError when something else is in that place, HostError when a package is missing.
    """
    import torch

    from train.trained import load_trained

    pinned, recipe = pins.pinned(run), config.load_run(run.recipe)
    kept = kept_tokenizer.load(layout, run, pinned)
    trained = load_trained(
        runs.job(layout, run, recipe, pinned), kept.record, torch.device("cpu"), checkpoint=checkpoint
    )
    facts = _facts(layout, run, recipe, pinned, trained, kept.record.name)
    writers = {name: _writer(name, dtype, run.root.name, trained.model, kept.tokenizer) for name in formats}
    place = make_folder(to or run.export)
    with locked(place / ".lock"):
        sweep(place)
        return [
            _export(place / name, terminal, writer, facts, trained, force=force) for name, writer in writers.items()
        ]


def _export(
    folder: Path,
    terminal: Terminal,
    writer: "Writer",
    facts: "CardFacts",
    trained: "Trained",
    *,
    force: bool,
) -> Path:
    from train.export.card import model_card
    from train.state.checkpoint import weights_hash

    record = folder.with_suffix(".json")
    print_ = fingerprint({"weights": weights_hash(trained.model.state_dict()), "dtype": writer.dtype, "card": 1})
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
    began = time.perf_counter()
    with published_folder(folder) as temp:
        writer.write(temp)
        compared = writer.check(temp)
        (temp / "README.md").write_text(model_card(facts._replace(check=compared, gguf=writer.gguf)), "utf-8")
        result = {"step": trained.step, "dtype": writer.dtype, "files": _sums(temp), "check": compared}
        # before the folder: one without a receipt is somebody else's, and its hashes say whether it is this one
        receipt.write(record, "export", print_, result, time.perf_counter() - began)
    what = f"step {trained.step:,}, {writer.dtype}, {time.perf_counter() - began:.1f} s"
    terminal.stage("export", f"{folder}, {what}")
    terminal.note(compared)
    return folder


class Writer(NamedTuple):
    """One format: `write` fills a folder, `check` compares what is in it with the model and says with what result.

    `gguf` is the name of the GGUF file, where there is one.
    """

    dtype: str
    write: Callable[[Path], None]
    check: Callable[[Path], str]
    gguf: str = ""


def _writer(name: FormatName, dtype: "GgufType | None", run: str, model: "Model", tokenizer: Tokenizer) -> Writer:
    match name:
        case "hf":
            return _hugging_face(dtype, model, tokenizer)
        case "gguf":
            return _gguf(dtype, run, model, tokenizer)
        case _:
            assert_never(name)


def _hugging_face(dtype: "GgufType | None", model: "Model", tokenizer: Tokenizer) -> Writer:
    from train.export import check, hugging_face

    name = "f32" if dtype is None or dtype == "q8_0" else dtype  # it has no blocks of 8 bits
    kind = hugging_face.DTYPES[name]

    def compare(folder: Path) -> str:
        if not check.can_check():
            return "not compared with the model: transformers is not installed (the extra is export)"
        found = check.check(folder, model, tokenizer, kind)
        largest = f"{found.max_logit_difference:.1g}"
        return f"transformers gives the same ids, and logits that differ by at most {largest}, on {found.texts} texts"

    return Writer(name, lambda folder: hugging_face.write(model, tokenizer, kind, folder), compare)


def _gguf(dtype: "GgufType | None", run: str, model: "Model", tokenizer: Tokenizer) -> Writer:
    from train.export import gguf_file

    if find_spec("gguf") is None:
        raise HostError(
            "the package gguf is not installed",
            "it writes the format that llama.cpp reads",
            ".venv/bin/pip install -c constraints.txt -e '.[export]', or --format hf",
        )
    kind: GgufType = dtype or "q8_0"
    file = f"{run}-{kind}.gguf"

    def write(folder: Path) -> None:
        gguf_file.write(model, tokenizer, kind, run, folder / file)
        (folder / "Modelfile").write_text(gguf_file.modelfile(file), "utf-8")

    def compare(folder: Path) -> str:
        return f"{gguf_file.check(folder / file, model, tokenizer, kind)} tensors were read back as they were written"

    return Writer(kind, write, compare, file)


def _sums(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in sorted(folder.glob("*"))}


def _facts(
    layout: Layout, run: RunPaths, recipe: Recipe, pinned: Pinned, trained: "Trained", tokenizer: str
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
        tokenizer=tokenizer,
        vocab_size=model.vocab_size,
        seq_len=recipe.model.seq_len,
        corpora=tuple(corpus.name for corpus in corpora) or tuple(path.name for path in paths),
        datasets=tuple((each["repo"], each["commit"]) for each in details),
        licence=", ".join(sorted({each["licence"] for each in details if "licence" in each})),
        hours=progress.seconds / 3600,
        kwh=progress.energy_kwh,
        recipe=config.to_toml(tables),
    )
