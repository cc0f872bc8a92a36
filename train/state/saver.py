"""Saving beside the training: the tensors are copied, then a thread writes, hashes, syncs and publishes the copy.

One save is in flight at most. What goes wrong in it is raised on the training's own thread, at the next step.
"""

import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from shards.atomic import nearest_existing
from shards.errors import DiskError, HostError, Interrupted, MillpondError
from train.model.gpt import Model
from train.optim.groups import Optimizers
from train.state import checkpoint as checkpoints
from train.state.checkpoint import Checkpoint

logger = logging.getLogger(__name__)


class Saver:
    """Publishes checkpoints into `folder`; `published` is called with the path of each, on the caller's thread.

    Takes as much host memory as one checkpoint has bytes, until it is published.
    """

    def __init__(self, folder: Path, keep: int, published: Callable[[Path], None]) -> None:
        self._folder, self._keep, self._published = folder, keep, published
        self._thread: threading.Thread | None = None
        self._outcome: Path | BaseException | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        """Wait for the save before, copy the tensors, and return: they may change while the copy is written.

        All that the checkpoint follows from must be durable already.
        """
        self.wait()
        copy = Checkpoint(checkpoint.progress, _copied(checkpoint.model), _copied(checkpoint.state))
        self._thread = threading.Thread(target=self._run, args=(copy,), name="saver", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what went wrong in a save that has ended; wait for nothing."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Return when nothing is in flight any more; raise what went wrong."""
        if self._thread is None:
            return
        self._thread.join()
        outcome, self._thread, self._outcome = self._outcome, None, None
        if isinstance(outcome, Path):
            self._published(outcome)
        elif outcome is not None:
            raise outcome

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        elif not isinstance(error, Interrupted):  # a second signal waits for nothing: the next start sweeps
            try:
                self.wait()
            except MillpondError as also:
                logger.warning("%s", also)

    def _run(self, checkpoint: Checkpoint) -> None:
        try:
            self._outcome = checkpoints.save(self._folder, checkpoint, self._keep)
        except BaseException as error:
            self._outcome = error


def checkpoint_nbytes(model: Model, optimizers: Optimizers) -> int:
    """The bytes of a checkpoint: the weights, and what the optimizers keep for each. AdamW two moments, Muon one."""
    nbytes: int = sum(tensor.nbytes for tensor in model.state_dict().values())
    for optimizer in optimizers.optimizers:
        moments = 2 if isinstance(optimizer, torch.optim.AdamW) else 1
        nbytes += moments * sum(weight.nbytes for group in optimizer.param_groups for weight in group["params"])
    return nbytes


def most_at_once(keep: int) -> int:
    """How many checkpoints there are at the fullest moment: the newest `keep`, the best, and the one being written."""
    return keep + 2


def require_room(folder: Path, nbytes: int, keep: int, saves: int) -> None:
    """Before a run that will save `saves` times: DiskError unless its checkpoints fit into `folder`.

    HostError when nothing may be written there.
    """
    if not saves:
        return
    place = nearest_existing(folder)
    if not os.access(place, os.W_OK | os.X_OK):
        raise HostError(
            f"{place}: not writable",
            "checkpoints are to be written there; nothing was changed",
            "make it writable, or choose another place with --home DIR",
        )
    there = len(checkpoints.steps(folder))
    count = max(1, min(most_at_once(keep), there + saves) - there)
    free = shutil.disk_usage(place).free
    if free < count * nbytes:
        raise DiskError(
            f"{folder}: checkpoints need about {count * nbytes:,} bytes and {free:,} are free",
            f"{count} more of {nbytes:,} bytes each: the newest {keep}, the best, and the one being written; "
            "nothing was changed",
            "free some space, keep fewer with --set train.keep_checkpoints=1, or choose another disk with --home DIR",
        )


def _copied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    contiguous = torch.contiguous_format
    return {name: tensor.detach().to("cpu", copy=True, memory_format=contiguous) for name, tensor in tensors.items()}
