"""Checkpoints: a folder that appears whole, hashed inside, and is believed only when every hash agrees.

`model.safetensors`, `state.safetensors` (optimizers, random generators, the guard), `state.json`, and `SHA256SUMS`
over them all, which `sha256sum -c` reads. Nothing is pickled.
"""

import errno
import hashlib
import logging
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from shards.atomic import make_folder, published_folder, sha256_of
from shards.errors import CorruptError, MillpondError, from_os_error
from shards.manifest import encode
from train.windows import LoaderState

logger = logging.getLogger(__name__)
SUMS = "SHA256SUMS"


class Progress(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a run is; `data` is where its loader is, and in what."""

    step: int
    tokens: int
    data: LoaderState
    recipe: str  # the fingerprint of all that can change what is learned
    parts: int


class Checkpoint(NamedTuple):
    """What is needed to go on exactly: names to tensors, on the CPU."""

    progress: Progress
    model: dict[str, torch.Tensor]
    state: dict[str, torch.Tensor]


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Publish `folder/step-NNNNNN`, then remove all but the newest `keep`."""
    path = make_folder(folder) / _name(checkpoint.progress.step)
    with published_folder(path) as temp:
        _write(checkpoint.model, temp / "model.safetensors")
        _write(checkpoint.state, temp / "state.safetensors")
        (temp / "state.json").write_bytes(encode(checkpoint.progress))
        sums = "".join(f"{sha256_of(file)}  {file.name}\n" for file in sorted(temp.iterdir()))
        (temp / SUMS).write_text(sums)
    for old in _steps(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None when there is none at all.

    A damaged one is reported and passed over. CorruptError when all are damaged.
    """
    damaged: list[str] = []
    for path in reversed(_steps(folder)):
        try:
            return load(path)
        except MillpondError as error:
            logger.warning("%s\nthis checkpoint is damaged; going back to the one before it", error.what)
            damaged.append(path.name)
    if damaged:
        raise CorruptError(
            f"{folder}: every checkpoint is damaged: {', '.join(damaged)}",
            "the run cannot go on from bytes that changed since they were written",
            "restore one from a backup, or start over with --fresh",
        )
    return None


def load(path: Path) -> Checkpoint:
    """One checkpoint; CorruptError unless every file is what SHA256SUMS says."""
    try:
        lines = (line.partition("  ") for line in (path / SUMS).read_text().splitlines())
        sums = {name: digest for digest, _, name in lines}
        for name in ("model.safetensors", "state.safetensors", "state.json"):
            found = sha256_of(path / name)
            if found != sums.get(name):
                raise CorruptError(f"{path / name}: sha256 is {found[:12]}…, {SUMS} says {sums.get(name, '')[:12]}…")
        progress = msgspec.json.decode((path / "state.json").read_bytes(), type=Progress)
        if path.name != _name(progress.step):
            raise CorruptError(f"{path}: holds step {progress.step}: the folder was renamed")
        return Checkpoint(
            progress,
            load_file(path / "model.safetensors"),
            load_file(path / "state.safetensors"),
        )
    except OSError as error:
        raise from_os_error(error, path, "read") from error
    except (ValueError, SafetensorError, msgspec.MsgspecError) as error:
        raise CorruptError(f"{path}: not a checkpoint: {error}") from error


def weights_hash(model: dict[str, torch.Tensor]) -> str:
    """One sha256 over all weights, to compare two runs by."""
    digest = hashlib.sha256()
    for name in sorted(model):
        digest.update(name.encode())
        digest.update(model[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # it hides the operating system's reason in its text
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error


def _name(step: int) -> str:
    return f"step-{step:06}"


def _steps(folder: Path) -> list[Path]:
    steps = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal() and path.is_dir()]
    return sorted(steps, key=lambda path: int(path.name.removeprefix("step-")))
