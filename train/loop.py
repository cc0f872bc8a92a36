"""The training loop, one column read from top to bottom: step, roll back, log, save, stop, evaluate, sample.

Everything that is written depends only on the recipe, the token folder and the step, so a run that was killed at any
instant and started again writes what it would have written. A checkpoint is saved before its step is evaluated and
sampled: a failure there costs no training, and a run that resumes from it evaluates and samples first.
"""

import math
import time
from pathlib import Path

import torch

from shards.errors import Interrupted, MillpondError, OutOfTime
from train.data.loader import TokenLoader
from train.evaluate import Evaluation, measure
from train.events import Ended, Evaluated, Event, Logged, Report, RolledBack, Sampled, Saved
from train.job import Result
from train.machine.compile import compiled_graphs
from train.machine.signals import caught_signals
from train.sample import generate
from train.session import Output, Session
from train.state import checkpoint as checkpoints
from train.state.checkpoint import Best
from train.state.rollback import is_due
from train.state.saver import Saver
from train.telemetry.metrics import NoLog, Row, RowLog

TIME_IS_UP = 1 << 16  # above every signal's number


def train(run: Session, report: Report, until: float = math.inf) -> Result:
    """Train a run, from where its newest valid checkpoint left it, to its last step.

    All ranks learn, evaluate and fail together; rank 0 alone reports and writes. After a checkpoint, Interrupted when a
    signal asked for an end, OutOfTime when time.monotonic() has reached `until`. A MillpondError from the saving of a
    checkpoint comes at a step after it.
    """
    job, state, ramp, meter = run.job, run.state, run.ramp, run.meter
    tell = report if run.world.is_first else _tell_nobody
    last_step = state.step if state.position else -1
    with (
        _rows(run, job.metrics, last_step, "val_loss" if _evaluates(run) else "") as metrics,
        _rows(run, job.samples, last_step, "text" if _samples(run) else "") as samples,
        run.loader() as loader,
        meter,
        caught_signals() as caught,
        Saver(
            job.checkpoints,
            job.train.keep_checkpoints,
            lambda path: tell(Saved(checkpoints.step_of(path), path)),
        ) as saver,
    ):
        out = Output(metrics, samples, saver, tell)
        _remove_surplus(run)
        tell(run.started())
        _evaluate_and_sample(run, out)
        meter.begin(state.step, run.tokens, loader.stats())

        while state.step < ramp.steps:
            # 1. Step. What went wrong in saving an earlier checkpoint is raised here.
            saver.check()
            lr = run.optimizers.schedule(state.step, ramp.planned(state.step))
            result = run.stepper.step(loader, run.accumulation)
            state.step += 1
            state.position = loader.position
            last = ramp.ends_at(state.step)
            ending = None if last else _ending(run, caught, until)

            # 2. Roll back to the newest checkpoint, if too many steps were skipped or a weight is not finite.
            if reason := run.rollback.due(state.step, stopping=ending is not None):
                _roll_back(run, out, loader, reason)
                continue

            # 3. Log. The host waits for the device here, and nowhere else in an ordinary step.
            if is_due(state.step, job.train.log_every) or last:
                _log(run, out, loader, lr, result.grad_norm)

            with meter.paused():
                # 4. Save.
                if run.rollback.saves or last or ending:
                    _save(run, out)

                # 5. Stop, if a signal or the clock asks for it; the checkpoint is published first.
                if ending:
                    saver.wait()
                    raise ending

                # 6. Evaluate and sample.
                _evaluate_and_sample(run, out)

        saver.wait()
        _remove_surplus(run)
        tell(Ended(state.step, run.tokens, compiled_graphs(run.model), meter.summary(run.tokens)))
    if state.evaluation is None:
        raise AssertionError("the last step is evaluated")
    weights = checkpoints.weights_hash(run.model.state_dict())
    return Result(ramp.steps, run.tokens, state.evaluation, weights, state.best)


def _ending(run: Session, caught: list[int], until: float) -> MillpondError | None:
    """What the run ends with after this step, if it is to end; it is saved first. All ranks agree on it."""
    reason = run.world.most(caught[0] if caught else TIME_IS_UP if time.monotonic() >= until else 0)
    saved = f"saved at step {run.state.step} of {run.ramp.steps}"
    if reason == TIME_IS_UP:
        return OutOfTime(saved)
    return Interrupted(reason, saved) if reason else None


def _roll_back(run: Session, out: Output, loader: TokenLoader, reason: str) -> None:
    """Go back to the newest checkpoint, and continue there with the windows after those that led here."""
    state, bad = run.state, run.state.step
    run.rollback.tell(bad, state.position)
    out.saver.wait()
    saved = checkpoints.load_latest_on_all_ranks(run.job.checkpoints, run.world)
    run.restore(run.rollback.begin(bad, reason, saved))
    skipped = state.position, loader.position
    state.position = loader.position
    run.guard.forgive()
    out.metrics.cut_back(state.step)
    out.samples.cut_back(state.step)
    out.metrics.write({"step": state.step + 1, "rollback_from": bad, "windows_skipped": skipped})
    run.meter.begin(state.step, run.tokens, loader.stats())
    out.report(RolledBack(state.step, bad, skipped, reason))


def _log(run: Session, out: Output, loader: TokenLoader, lr: float, grad_norm: torch.Tensor) -> None:
    """One row: the mean loss since the row before, and what the steps between them cost."""
    state = run.state
    loss = run.guard.mean_loss()  # the device is waited for here
    run.rollback.tell(state.step, state.position)
    if loss is None:
        return  # all its steps were skipped: the next row tells of them
    row: Row = {
        "step": state.step,
        "tokens": run.tokens,
        "loss": loss,
        "lr": lr,
        "grad_norm": grad_norm.item(),
        **run.meter.read(state.step, run.tokens, loader.stats()),
        **run.stepper.counts(),
    }
    out.metrics.write(row)
    rate = max(row["tok_per_s"], 0.1)  # a process that was suspended shows none
    out.report(Logged(row, run.ramp.steps, (run.ramp.tokens - run.tokens) / rate))


def _save(run: Session, out: Output) -> None:
    """Begin to save a checkpoint of this step; everything that led to it is on disk before."""
    run.rollback.saved()
    checkpoint = run.checkpoint()
    if run.world.is_first:
        out.metrics.sync()
        out.samples.sync()
        out.saver.save(checkpoint)


def _evaluates(run: Session) -> bool:
    step = run.state.step
    return is_due(step, run.job.train.eval_every) or step == 0 or run.ramp.ends_at(step)


def _samples(run: Session) -> bool:
    step = run.state.step
    return step > 0 and (is_due(step, run.job.train.sample_every) or run.ramp.ends_at(step))


def _evaluate_and_sample(run: Session, out: Output) -> None:
    """Where this step is due for it. A run that resumes from this step does it again, with the same rows.

    Each evaluation is over the same tokens, so that the losses can be compared; the last step has one over more, where
    validation has more.
    """
    train, step = run.job.train, run.state.step
    if _evaluates(run):
        found = _evaluate(run, out, train.eval_tokens)
        if step and run.rollback.calm:  # a model that has learned nothing is no best one
            _compare(run, out, Best(step, found.loss, found.tokens))
        if run.ramp.ends_at(step) and found.tokens < run.sources.evaluated_tokens(train.final_eval_tokens):
            _evaluate(run, out, train.final_eval_tokens)
    if _samples(run) and run.world.is_first:
        for prompt in train.prompts:
            with run.autocast():
                text = generate(run.model, run.sources.tokenizer, prompt, train.sample_tokens)
            out.samples.write({"step": step, "prompt": prompt, "text": text})
            out.report(Sampled(step, prompt, text))


def _evaluate(run: Session, out: Output, tokens: int) -> Evaluation:
    found = measure(
        run.sources,
        run.model,
        tokens,
        run.fit.eval_batch,
        run.autocast,
        document_mask=run.job.train.document_mask,
        world=run.world,
    )
    if not math.isfinite(found.loss):
        run.rollback.refuse(run.state.step, "the validation loss is not finite")
    run.state.evaluation = found
    row: Row = {"step": run.state.step, "tokens": run.tokens, **found.row()}
    out.metrics.write(row)
    out.report(Evaluated(row))
    return found


def _compare(run: Session, out: Output, found: Best) -> None:
    """Mark this step as the best when it is: its checkpoint was saved before that could be known.

    Only once that is published: the mark before is of a checkpoint that is there.
    """
    run.state.best = checkpoints.better(run.state.best, found)
    if run.state.best.step == run.state.step and run.world.is_first:
        out.saver.wait()
        checkpoints.mark_best(run.job.checkpoints, run.state.best)


def _rows(run: Session, path: Path, last_step: int, repeated: str) -> RowLog:
    return RowLog(path, last_step, repeated) if run.world.is_first else NoLog()


def _remove_surplus(run: Session) -> None:
    if run.world.is_first:
        keep = run.job.train.keep_checkpoints
        checkpoints.remove_surplus(run.job.checkpoints, run.state.step, run.state.best, keep)


def _tell_nobody(_event: Event) -> None: ...
