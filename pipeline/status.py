"""What is there: token folders and runs, read from their manifests, receipts and metrics alone."""

from pathlib import Path
from typing import Any

import msgspec

from pipeline import folders
from pipeline.layout import Layout, RunPaths

TAIL_BYTES = 1 << 16


def status(layout: Layout) -> dict[str, list[dict[str, Any]]]:
    """Every token folder and every run under the home. What cannot be read says so in its own row."""
    runs = sorted(path.parent for path in layout.runs.glob("*/run.toml"))
    return {
        "tokens": [row._asdict() for row in folders.table(layout)],
        "runs": [_run(RunPaths(path)) for path in runs],
    }


def _run(run: RunPaths) -> dict[str, Any]:
    row: dict[str, Any] = {"run": run.root.name, "state": "done" if run.receipt.exists() else "unfinished"}
    for found in _tail(run.metrics):
        for key in ("step", "tokens", "loss", "val_loss", "tok_per_s", "stall_percent"):
            if isinstance(found.get(key), int | float):
                row[key] = found[key]
    steps = sorted(run.checkpoints.glob("step-*"))
    row["checkpoint"] = steps[-1].name if steps else None
    return row


def _tail(path: Path) -> list[dict[str, Any]]:
    """The last whole rows of a file."""
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
