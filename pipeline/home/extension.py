"""Making a run longer: what its recipe becomes, and what its learning rate does from there on."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from pipeline import config
from pipeline.config import Recipe
from pipeline.home.layout import RunPaths
from shards.atomic import move
from shards.errors import ConfigError, RefusedError
from train.config import EarlierLength, OptimConfig, TrainConfig
from train.schedule import Ramp, lr_factor

if TYPE_CHECKING:  # torch is loaded by what needs it
    from train.job import Job


class Length(NamedTuple):
    """How long a run is to be in all: in steps or in tokens, the other 0."""

    steps: int = 0
    tokens: int = 0


def extend(run: RunPaths, job: "Job", length: Length) -> list[str]:
    """Make the run as long as `length`, in its run.toml, and say what that means; nothing if it is that long already.

    `job` is the run as it is. The receipt of its earlier end is kept under another name, because from here on the run
    is not finished. The caller holds the run's lock. ConfigError when the run would become shorter, RefusedError when
    its weights are gone or another recipe's.
    """
    name, train = run.root.name, job.train
    before = Ramp(job.model, train)
    steps = length.steps or before.steps + (length.tokens - before.tokens) // train.batch_tokens
    if steps == before.steps:
        return [f"{name} is {steps:,} steps long already"]
    if steps < before.steps:
        raise ConfigError(
            f"{name} is planned for {before.steps:,} steps ({before.tokens:,} tokens), {max(0, steps):,} are asked for",
            "a run can be made longer, not shorter: its learning rate followed the longer plan",
            f"ask for more than that, or leave the length out: millpond resume {name}",
        )
    step = _saved_step(run, job)
    longer = msgspec.structs.replace(train, steps=length.steps, tokens=length.tokens, earlier=_earlier(train, step))
    after = Ramp(job.model, longer)
    if run.receipt.exists():
        move(run.receipt, run.former_receipt(before.steps))
    config.save(msgspec.structs.replace(config.load_run(run.recipe), train=longer), run.recipe)
    return [f"{name}: {before.steps:,} steps become {after.steps:,}", *_rates(job.optim, before, after, step)]


def with_length_of(recipe: Recipe, longer: Recipe) -> Recipe:
    """`recipe`, whose other fields may have been set for now, as long as `longer`."""
    train = longer.train
    length = {"steps": train.steps, "tokens": train.tokens, "earlier": train.earlier}
    return msgspec.structs.replace(recipe, train=msgspec.structs.replace(recipe.train, **length))


def _saved_step(run: RunPaths, job: "Job") -> int:
    """The step of the newest checkpoint, from which the run resumes; 0 before the first one."""
    from train.state.checkpoint import load_latest

    saved = load_latest(run.checkpoints)
    if saved is not None:
        job.require_same_recipe(saved.progress)
        return saved.step
    if run.receipt.exists():
        raise RefusedError(
            f"{run.checkpoints}: no checkpoint",
            f"run {run.root.name} is finished and its weights are gone: there is nothing to train longer",
            f"bring a checkpoint back, or start over: millpond train {run.recipe} --name {run.root.name} --fresh",
        )
    return 0


def _earlier(train: TrainConfig, step: int) -> tuple[EarlierLength, ...]:
    """The lengths before, when a run of the length that `train` says is made longer after `step` steps.

    A length that had not begun by then is none: the run resumes from before it.
    """
    if step <= (train.earlier[-1].until if train.earlier else 0):
        return train.earlier
    return (*train.earlier, EarlierLength(tokens=train.tokens, steps=train.steps, until=step))


def _rates(optim: OptimConfig, before: Ramp, after: Ramp, step: int) -> Iterator[str]:
    """What the learning rate does, in lines that fit a terminal."""

    def rate(done: int, ramp: Ramp) -> float:
        """That of the step which ends with `done` steps."""
        return optim.lr * lr_factor(optim, done - 1, ramp.planned(done - 1))

    continues = step and optim.lr * lr_factor(optim, step - 1, after.steps) == rate(step, before)
    how = "continues" if continues else f"is recomputed over all {after.steps:,} steps"
    yield f"its learning rate, {optim.schedule}, {how}:"
    shown = [(step, before)] * (step > 0) + [(step + 1, after)] + [(after.steps, after)] * (after.steps > step + 1)
    yield ", ".join(f"{rate(done, ramp):.2e} at step {done:,}" for done, ramp in shown)
