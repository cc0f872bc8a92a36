"""What is there: token folders and runs, read from their manifests, receipts and metrics alone."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from pipeline.home import folders, kept_tokenizer, pins
from pipeline.home.layout import Layout, RunPaths
from shards.errors import MillpondError

TAIL_BYTES = 1 << 16


def status(layout: Layout) -> dict[str, list[dict[str, Any]]]:
    """Every token folder and every run under the home. What cannot be read says so in its own row."""
    paths = sorted(path.parent for path in layout.runs.glob("*/run.toml"))
    return {
        "tokens": [row._asdict() for row in folders.table(layout)],
        "runs": [_run(layout, RunPaths(path)) for path in paths],
    }


def _run(layout: Layout, run: RunPaths) -> dict[str, Any]:
    row: dict[str, Any] = {"run": run.root.name, "state": "done" if run.receipt.exists() else "unfinished"}
    row |= _trained_on(layout, run)
    for found in _tail(run.metrics):
        for key in ("step", "tokens", "loss", "val_loss", "tok_per_s", "stall_percent"):
            if isinstance(found.get(key), int | float):
                row[key] = found[key]
        if "val_loss" in found:
            row["val_step"] = found.get("step")
    steps = sorted(run.checkpoints.glob("step-*"))
    row["checkpoint"] = steps[-1].name if steps else None
    return row


def _trained_on(layout: Layout, run: RunPaths) -> dict[str, Any]:
    """The run's token folders, whether they are in this home, and the tokenizer that it keeps."""
    found: dict[str, Any] = {"token_folders": [], "tokens_here": False, "tokenizer": None, "vocab_size": None}
    with suppress(MillpondError):
        pinned = pins.pinned(run)
        found |= {"token_folders": [one.folder for one in pinned.folders], "tokens_here": pinned.are_in(layout)}
        if record := kept_tokenizer.record_of(run):
            found |= {"tokenizer": record.name, "vocab_size": record.vocab_size}
    return found


def _tail(path: Path) -> list[dict[str, Any]]:
    """The last complete rows of a file."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = file.read().splitlines(keepends=True)
    rows = []
    for line in lines:
        try:
            rows.append(msgspec.json.decode(line, type=dict[str, Any]))
        except msgspec.MsgspecError:
            continue  # the first line may be cut by the seek, the last by a kill
    return rows
