"""Checkpoints: a folder that appears complete, with hashes inside, and is valid only when every hash agrees.

`model.safetensors`, `state.safetensors` (optimizers, random generators, the guard), `state.json`, and `SHA256SUMS`
over them all, which `sha256sum -c` reads. Nothing is pickled. The newest are kept, and the one of the best evaluation.

A checkpoint is saved before its step is evaluated, and knows the best of the evaluations before. `best.json` beside the
checkpoints is written after an evaluation that is the best so far; it counts where the newest checkpoint is its step's.
"""

import errno
import hashlib
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from shards.atomic import discard, make_folder, publish_bytes, published_folder, sha256_of
from shards.errors import ConfigError, CorruptError, RefusedError, from_os_error
from shards.manifest import TokenizerRecord, encode
from train.data.windows import LoaderState
from train.machine.ranks import World

logger = logging.getLogger(__name__)
SUMS = "SHA256SUMS"
BEST = "best.json"
DAMAGED = (CorruptError, ConfigError)  # wrong bytes, or a file that is missing
_STEP = re.compile(r"step-\d+", re.ASCII)
FILES = ("model.safetensors", "state.json", "state.safetensors")


class Best(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The step whose evaluation, over the first `val_tokens` of validation, gave the lowest loss in nats per token."""

    step: int
    val_loss: float
    val_tokens: int


class Progress(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a run is; `data` is where its loader is, and in what."""

    step: int
    tokens: int
    data: LoaderState
    recipe: str  # the fingerprint of all that can change what is learned
    identity: dict[str, Any] | None = None  # all of it, by table and field; None where it was not yet kept
    tokenizer: TokenizerRecord | None = None  # whose ids the weights know; None where it was not yet kept
    parts: int
    best: Best | None = None  # of the evaluations before this step's own
    seconds: float = 0.0  # what the run has cost so far: no result, and different each time
    energy_kwh: float = 0.0


class Stateful(Protocol):
    """A part of a run with tensors that must come back for the next step to be the one it would have been."""

    def state(self) -> dict[str, torch.Tensor]:
        """All of them, by name."""

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what `state()` gave."""


def gather(parts: Mapping[str, Stateful]) -> dict[str, torch.Tensor]:
    """The tensors of all parts, named `part.name`; of the one part whose name is "", as it names them."""
    return {_joined(part, name): value for part, each in parts.items() for name, value in each.state().items()}


def scatter(state: Mapping[str, torch.Tensor], parts: Mapping[str, Stateful]) -> None:
    """Give each part what `gather` took from it, in any order. KeyError for a tensor that is missing."""
    own: dict[str, dict[str, torch.Tensor]] = {part: {} for part in parts}
    for name, value in state.items():
        part = name.partition(".")[0]
        own[part if part in own else ""][name.removeprefix(part).removeprefix(".") if part in own else name] = value
    for part, each in parts.items():
        try:
            each.load_state(own[part])
        except KeyError as error:
            raise KeyError(_joined(part, str(error.args[0]))) from error


def _joined(part: str, name: str) -> str:
    return f"{part}.{name}" if part and name else part or name


class Checkpoint(NamedTuple):
    """What is needed to resume exactly: names to tensors, on the CPU."""

    progress: Progress
    model: dict[str, torch.Tensor]
    state: dict[str, torch.Tensor]

    @property
    def step(self) -> int:
        """How many steps it has learned from."""
        return self.progress.step


def better(best: Best | None, found: Best) -> Best:
    """The lower loss of both; `found` too when the other is of the same step, or of another number of tokens."""
    if best is None or best.step == found.step or best.val_tokens != found.val_tokens:
        return found
    return min(best, found, key=lambda each: each.val_loss)


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Publish `folder/step-NNNNNN`, then remove what is not kept any more, and what claims to be of a later step."""
    progress = checkpoint.progress
    path = make_folder(folder) / _name(progress.step)
    with published_folder(path) as temp:
        _write(checkpoint.model, temp / "model.safetensors")
        _write(checkpoint.state, temp / "state.safetensors")
        (temp / "state.json").write_bytes(encode(progress))
        (temp / SUMS).write_bytes(_sums(temp))
    for later in (path for path in steps(folder) if step_of(path) > progress.step):
        discard(later)  # it was damaged, or the run would not be here again; kept, it would replace a valid one
    remove_surplus(folder, progress.step, progress.best, keep)
    return path


def mark_best(folder: Path, best: Best) -> None:
    """Publish `best` beside the checkpoints, where that of its step is."""
    publish_bytes(make_folder(folder) / BEST, encode(best))


def remove_surplus(folder: Path, step: int, best: Best | None, keep: int) -> None:
    """Remove all checkpoints up to `step` but the newest `keep` and the best."""
    for old in [path for path in steps(folder) if step_of(path) <= step][:-keep]:
        if best is None or step_of(old) != best.step:
            discard(old)


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest valid checkpoint, or None when there is none at all.

    A damaged one, or one with a file missing, is reported and passed over; CorruptError when all are damaged. For one
    that cannot be read the machine's error: its bytes may be right, and it is the newer. One that the trainer beside us
    removes while it is read is neither: then there is a newer one.
    """
    damaged: list[str] = []
    for path in reversed(steps(folder)):
        try:
            return load(path)
        except DAMAGED as error:
            if not path.exists():
                return load_latest(folder)
            logger.warning("%s\nthis checkpoint is damaged; going back to the one before it", error.what)
            damaged.append(path.name)
    if damaged:
        raise CorruptError(
            f"{folder}: every checkpoint is damaged: {', '.join(damaged)}",
            "the run cannot resume from bytes that changed since they were written",
            "restore one from a backup, or start over with --fresh",
        )
    return None


def load_best(folder: Path) -> Checkpoint | None:
    """The checkpoint of the best evaluation; said loudly, the newest, when that is damaged or there was none yet."""
    newest = load_latest(folder)
    if newest is None:
        return None
    best = known_best(folder, newest.progress)
    if best is None:
        logger.warning("%s: no checkpoint is known to be the best; using the newest, step %d", folder, newest.step)
        return newest
    return newest if best.step == newest.step else load(folder / _name(best.step))


def load_chosen(folder: Path, chosen: str) -> Checkpoint | None:
    """The checkpoint `chosen`: `newest`, `best`, a step, or a checkpoint's path. None when there is none at all.

    RefusedError when that one is not there, CorruptError when it is damaged.
    """
    if chosen == "newest":
        return load_latest(folder)
    if chosen == "best":
        return load_best(folder)
    there = steps(folder)
    if not there:
        return None
    path = folder / _name(chosen) if chosen.isdecimal() else Path(chosen)
    others = ", ".join(str(step_of(each)) for each in there if each != path)
    try:
        is_there = path.is_dir()
    except OSError:  # a name that is too long, or a folder that may not be read
        is_there = False
    if not is_there:
        raise RefusedError(
            f"{path}: no checkpoint",
            "only the newest checkpoints of a run are kept, and the best",
            f"--checkpoint newest, best, or one of these steps: {others}",
        )
    try:
        return load(path)
    except DAMAGED as error:
        raise CorruptError(
            error.what,
            "its weights are not those that were saved",
            f"--checkpoint newest, or one of these steps: {others}",
        ) from error


def known_best(folder: Path, progress: Progress) -> Best | None:
    """The best so far. When its checkpoint is not valid any more it is forgotten, which logs a warning."""
    marked = _marked_best(folder)
    if marked is not None and marked.step == progress.step:
        return marked
    best = progress.best
    if best is not None and best.step != progress.step:
        try:
            check(folder / _name(best.step))
        except DAMAGED as error:
            logger.warning("%s\nthe best checkpoint is damaged; it is not the best any more", error.what)
            return None
    return best


def _marked_best(folder: Path) -> Best | None:
    try:
        return msgspec.json.decode((folder / BEST).read_bytes(), type=Best)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise from_os_error(error, folder / BEST, "read") from error
    except (ValueError, msgspec.MsgspecError) as error:
        logger.warning("%s: cannot be read, and is ignored: %s", folder / BEST, error)
        return None


def load(path: Path) -> Checkpoint:
    """One checkpoint; CorruptError unless every file is what SHA256SUMS says."""
    progress = check(path)
    try:
        return Checkpoint(progress, load_file(path / "model.safetensors"), load_file(path / "state.safetensors"))
    except OSError as error:
        raise from_os_error(error, path, "read") from error
    except (ValueError, RuntimeError, SafetensorError) as error:  # a file that is gone is torch's RuntimeError
        raise CorruptError(f"{path}: not a checkpoint: {error}") from error


def check(path: Path) -> Progress:
    """Read every byte of a checkpoint; CorruptError unless SHA256SUMS is to the letter what it should be."""
    try:
        said, found = (path / SUMS).read_bytes(), _sums(path)
        for name, line in zip(FILES, found.splitlines(), strict=True):
            if line not in said.splitlines():
                raise CorruptError(f"{path / name}: its sha256, {line[:12].decode()}…, is not what {SUMS} says")
        if said != found:
            raise CorruptError(f"{path / SUMS}: not exactly the lines of {', '.join(FILES)}")
        progress = msgspec.json.decode((path / "state.json").read_bytes(), type=Progress)
    except OSError as error:
        raise from_os_error(error, path, "read") from error
    except (ValueError, msgspec.MsgspecError) as error:
        raise CorruptError(f"{path}: not a checkpoint: {error}") from error
    if path.name != _name(progress.step):
        raise CorruptError(f"{path}: holds step {progress.step}: the folder was renamed")
    return progress


def load_latest_on_all_ranks(folder: Path, world: World) -> Checkpoint | None:
    """`load_latest` as rank 0 finds it; the other ranks load the same one, and compare its hashes for themselves."""
    found = load_latest(folder) if world.is_first else None
    step = world.first(lambda: found.progress.step if found else -1, int)
    return found if world.is_first or step < 0 else load(folder / _name(step))


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
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number) if found else str(error)) from error


def _sums(path: Path) -> bytes:
    return "".join(f"{sha256_of(path / name)}  {name}\n" for name in FILES).encode()


def _name(step: int | str) -> str:
    return f"step-{step:>06}"


def step_of(path: Path) -> int:
    """The step a checkpoint's name says."""
    return int(path.name.removeprefix("step-"))


def steps(folder: Path) -> list[Path]:
    """The checkpoints there are, valid or not, by step."""
    try:  # a glob passes over what may not be read, and the run would begin again from step 0
        names = [path for path in folder.iterdir() if _STEP.fullmatch(path.name)]
        return sorted((path for path in names if path.is_dir()), key=step_of)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise from_os_error(error, folder, "read") from error
