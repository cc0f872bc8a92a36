"""Training a run: begun, resumed, made longer; one process leads and, under torchrun, the others follow."""

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipeline import checks, config, drift
from pipeline.home import extension, kept_tokenizer, pins, receipt, runs, trackers
from pipeline.home.extension import Length
from pipeline.home.layout import RunPaths
from pipeline.stages import Pipeline
from shards.atomic import move, sweep
from shards.errors import RefusedError
from shards.fingerprint import fingerprint
from train.events import Event
from train.machine.ranks import World, joined
from train.schedule import Ramp, oddities, rank_share

MANY_EPOCHS = 4  # up to about which repeated text is worth as much as new text (Muennighoff et al. 2023)


def train(pipeline: Pipeline, name: str, *, fresh: bool = False, until: float = math.inf) -> None:
    """Prepare what is missing, then train the run `name`, or resume it, or say that it is done.

    OutOfTime, after a checkpoint, when time.monotonic() has come to `until` before the last step.
    """
    run = pipeline.layout.run(runs.checked_name(name))
    with joined(pipeline.recipe.train.device) as world:
        rank_share(pipeline.recipe.model, pipeline.recipe.train, world.size)  # refuses what cannot be, before any work
        if world.is_first:
            _begin(pipeline, world, run, until, fresh=fresh)
        else:
            _follow(pipeline, world, run, until)


def resume(pipeline: Pipeline, run: RunPaths, *, length: Length | None = None, until: float = math.inf) -> None:
    """Train a run, whose recipe this is, on the tokens that it was started on, from where it stopped to its end.

    A `length` makes it longer first. OutOfTime as `train` has it.
    """
    with joined(pipeline.recipe.train.device) as world:
        rank_share(pipeline.recipe.model, pipeline.recipe.train, world.size)
        if world.is_first:
            _resume(pipeline, world, run, until, length)
        else:
            _follow(pipeline, world, run, until)


def _begin(pipeline: Pipeline, world: World, run: RunPaths, until: float, *, fresh: bool) -> None:
    """What the one process that writes does for `train`: all of it."""
    trackers.require(pipeline.recipe.train.trackers)
    checks.require_trainable(pipeline.layout, pipeline.recipe)
    if fresh or not run.receipt.exists():  # a run that is done needs no device
        pipeline.require_device()
    if fresh:
        weights = pipeline.prepare()
    else:
        pipeline.recipe = runs.as_begun(run, pipeline.recipe)
        drift.refuse_before_work(pipeline.layout, run, pipeline.recipe)
        with drift.with_ways_out(pipeline.layout, run):
            weights = pipeline.prepare(run=run)
    with _held(pipeline, run):
        aside = runs.set_aside(run) if fresh and run.root.exists() else None
        pinned = pins.pin(weights)
        if run.recipe.exists():
            runs.refuse_drift(run, runs.identity_of(pipeline.recipe, pinned))
            pinned = pins.pinned(run)
        elif run.checkpoints.exists():
            raise RefusedError(
                f"{run.recipe}: is missing, and there are checkpoints",
                "the recipe that made them is not known any more",
                f"restore it, or start over: millpond train {pipeline.config} --name {run.root.name} --fresh",
            )
        _train(pipeline, world, run, pinned, until, aside)


def _resume(pipeline: Pipeline, world: World, run: RunPaths, until: float, length: Length | None) -> None:
    """What the one process that writes does for `resume`."""
    trackers.require(pipeline.recipe.train.trackers)
    if length or not run.receipt.exists():
        pipeline.require_device()
    pinned = pins.pinned(run)
    drift.refuse_to_resume(run, pipeline.recipe, pinned)
    runs.require_tokens(pipeline.layout, run, pinned, "resume")
    for one in pinned.folders:
        pipeline.verify(pipeline.layout.tokens / one.folder)
    with _held(pipeline, run):
        if length:
            job = runs.job(pipeline.layout, run, config.load_run(run.recipe), pinned)
            for line in extension.extend(run, job, length):
                pipeline.terminal.note(line)
            pipeline.recipe = extension.with_length_of(pipeline.recipe, config.load_run(run.recipe))
        _train(pipeline, world, run, pinned, until)


@contextmanager
def _held(pipeline: Pipeline, run: RunPaths) -> Iterator[None]:
    """Keep other processes away from the run, and sweep what a killed one left of it."""
    with pipeline.locked(f"run-{run.root.name}", run.receipt, wait=False):
        sweep(run.root)
        sweep(run.checkpoints)
        yield


def _train(
    pipeline: Pipeline, world: World, run: RunPaths, pinned: pins.Pinned, until: float, aside: Path | None = None
) -> None:
    """Train the run, which begins now if it does not exist. `aside` is what comes back when it cannot begin."""
    name, print_ = run.root.name, fingerprint(runs.identity_of(pipeline.recipe, pinned))
    done = receipt.read(run.receipt, print_)
    steps, loss = (done.result.get(key) if done else None for key in ("steps", "val_loss"))
    if isinstance(steps, int) and isinstance(loss, float):
        what = f"{name}  {steps:,} steps, validation {loss:.4f}"
        pipeline.terminal.stage("train", what, done=True)
        world.first(lambda: [], list[runs.Begun])  # nothing for the others to do
        return

    from train.loop import train as train_to_the_end
    from train.session import Session

    began = time.perf_counter()
    for oddity in oddities(pipeline.recipe.optim, Ramp(pipeline.recipe.model, pipeline.recipe.train).steps):
        pipeline.terminal.note(oddity)
    pipeline.terminal.note("setting up the model and measuring this device")
    mirrors = trackers.Trackers(pipeline.recipe.train.trackers, run, pipeline.recipe)

    def report(event: Event) -> None:
        pipeline.terminal.training(event)
        mirrors.training(event)

    with ExitStack() as held:  # until the run names them
        for folder in sorted(one.folder for one in pinned.folders):
            held.enter_context(pipeline.locked(folder, pipeline.layout.receipt("tokenize", folder)))
        try:
            runs.require_tokens(pipeline.layout, run, pinned, "train")
            world.first(lambda: [runs.Begun(pinned, pipeline.recipe)], list[runs.Begun])
            session = Session(runs.job(pipeline.layout, run, pipeline.recipe, pinned), world)
        except BaseException:
            if aside:
                move(aside, run.root)  # what cannot begin does not push aside what was
            raise
        if (epochs := session.epochs) > MANY_EPOCHS:
            pipeline.terminal.note(f"the run reads its training tokens {epochs:,.1f} times; more text would help")
        if aside:
            pipeline.terminal.note(f"the run before is kept as {aside.name}")
        if not run.recipe.exists():
            runs.begin(pipeline.layout, run, pipeline.recipe, pinned)
        elif not run.tokenizer.exists():  # it was begun before runs kept one
            kept_tokenizer.keep(run, pipeline.layout.tokens / pinned.folder)
    with mirrors:
        result = train_to_the_end(session, report, until)
    numbers = {
        "steps": result.steps,
        "tokens": result.tokens,
        "val_loss": result.evaluation.loss,
        "val_bpb": result.evaluation.bpb,
        "val_tokens": result.evaluation.tokens,
        "weights_sha256": result.weights_sha256,
    }
    if result.best:
        numbers |= {"best_step": result.best.step, "best_val_loss": result.best.val_loss}
    receipt.write(run.receipt, "train", print_, numbers, time.perf_counter() - began)
    pipeline.terminal.finished(name, run, numbers)


def _follow(pipeline: Pipeline, world: World, run: RunPaths, until: float) -> None:
    """What the other processes do: wait until the tokens are there, and train."""
    from train.loop import train as train_to_the_end
    from train.session import Session

    for begun in world.first(lambda: [], list[runs.Begun]):
        job = runs.job(pipeline.layout, run, begun.recipe, begun.pinned)
        train_to_the_end(Session(job, world), pipeline.terminal.training, until)
