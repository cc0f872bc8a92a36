"""The training loop, one column read from top to bottom: step, log, save, evaluate, sample.

Everything that is written depends only on the recipe, the token folder and the step, so a run that was killed at any
instant and started again writes what it would have written. A checkpoint is saved before its step is evaluated and
sampled: a failure there costs no training, and a run that resumes from it evaluates and samples first.
"""

import math
import time
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from shards.errors import CorruptError, Interrupted, MillpondError, OutOfTime
from train.data.loader import TokenLoader
from train.data.sources import OpenSources
from train.data.windows import position_of
from train.evaluate import Evaluation, measure
from train.job import Emit, Job, Result, require_same_tokenizer
from train.machine.compile import compile_model, compiled_graphs, wants_compile
from train.machine.device import (
    autocast,
    device_name,
    devices_here,
    loss_scaler,
    pick_device,
    resolve_precision,
)
from train.machine.memory import cap_memory
from train.machine.ranks import World
from train.machine.signals import caught_signals
from train.micro_batch import Fit, best_fit
from train.model.gpt import Model
from train.optim.groups import Optimizers
from train.sample import generate
from train.schedule import Ramp, rank_share
from train.state import checkpoint as checkpoints
from train.state import rng
from train.state.checkpoint import Best, Checkpoint, Progress
from train.state.guard import Guard
from train.state.rollback import Rollback, is_due
from train.state.saver import Saver, checkpoint_nbytes, require_room
from train.step import Stepper
from train.telemetry.meter import Meter
from train.telemetry.metrics import NoLog, Row, RowLog
from train.telemetry.power import card_power

TIME_IS_UP = 1 << 16  # above every signal's number


class Trainer:
    """One run, from its newest whole checkpoint (or the beginning) to its end.

    All ranks of `world` learn, evaluate and fail together; rank 0 alone emits and writes.
    """

    def __init__(self, job: Job, emit: Emit, world: World | None = None) -> None:
        self.job, self.world = job, world or World()
        self.emit = emit if self.world.is_first else _say_nothing
        self.ramp = Ramp(job.model, job.train)
        self.steps = self.ramp.steps
        self.device = pick_device(job.train.device)
        self.precision = resolve_precision(job.train, self.device)
        self.sources = OpenSources(job.sources, job.model.seq_len, verify="hash" if self.world.is_first else "size")
        vocab_size = self.sources.tokenizer.vocab_size
        self.windows = self.sources.training(job.train)
        share = rank_share(job.model, job.train, self.world.size)
        self.fit = self.world.first(
            lambda: best_fit(job.model, job.optim, share, vocab_size, self.device, job.fits), Fit
        )
        self.micro_batch = self.fit.micro_batch
        if self.device.type == "cuda":
            cap_memory(self.device)
        torch.manual_seed(job.train.seed)
        self.model = Model(job.model, vocab_size).to(self.device)
        self.model.checkpoint_activations = job.train.checkpoint_activations
        if wants_compile(job.train, self.device):
            compile_model(self.model)
        self.optimizers = Optimizers(self.model, job.optim)
        self.guard = Guard(self.device, job.train.spike_z)
        self.stepper = Stepper(
            self.model,
            self.optimizers,
            job.optim.clip,
            self._autocast,
            loss_scaler(self.device, self.precision),
            self.guard,
            self.world,
        )
        power = card_power(devices_here(self.device)) if self.world.is_first else None
        price, processes = job.train.kwh_price, self.world.size
        self.meter = Meter(job.model, vocab_size, self.device, self.precision, power, price, processes)
        rng.seed_apart(self.world, job.train.seed, 0)
        self.step = self.position = 0
        self.rollback = Rollback(self.guard, self.model, job.optim, job.train, self.ramp)
        self.best: Best | None = None
        self.evaluation: Evaluation  # the newest
        if saved := checkpoints.load_agreed(job.checkpoints, self.world):
            self._restore(saved)
            self.meter.go_on(saved.progress.seconds, saved.progress.energy_kwh)
        if self.world.is_first:
            nbytes = checkpoint_nbytes(self.model, self.optimizers)
            require_room(job.checkpoints, nbytes, job.train.keep_checkpoints, self._saves_left())

    def run(self, until: float = math.inf) -> Result:
        """Train to the last step.

        After a checkpoint, Interrupted when a signal asked for an end, OutOfTime when time.monotonic() has reached
        `until`. A MillpondError from the saving of a checkpoint comes at a step after it.
        """
        train = self.job.train
        last_step = self.step if self.position else -1
        with (
            self._rows(self.job.metrics, last_step, "val_loss" if self._evaluates else "") as self.metrics,
            self._rows(self.job.samples, last_step, "text" if self._samples else "") as self.samples,
            self._loader() as loader,
            self.meter,
            caught_signals() as caught,
            Saver(self.job.checkpoints, train.keep_checkpoints, self._saved) as self.saver,
        ):
            self._remove_surplus()
            self._announce()
            self._evaluate_and_sample()
            self.meter.begin(self.step, self.tokens, loader.stats())
            while self.step < self.steps:
                self.saver.check()
                self.lr = self.optimizers.schedule(self.step, self.ramp.planned(self.step))
                result = self.stepper.step(loader, self._accumulation(self.step))
                self.step += 1
                self.position = loader.position
                last = self.ramp.ends_at(self.step)
                ending = None if last else self._ending(caught, until)
                if reason := self.rollback.due(self.step, stopping=ending is not None):
                    self._roll_back(loader, reason)
                    continue
                if is_due(self.step, train.log_every) or last:
                    self._log(loader, result.grad_norm)
                with self.meter.paused():
                    if self.rollback.saves or last or ending:
                        self._save()
                    if ending:
                        self.saver.wait()
                        raise ending
                    self._evaluate_and_sample()
            self.saver.wait()
            self._remove_surplus()
            end: Row = {"step": self.step, "tokens": self.tokens, "graphs": compiled_graphs(self.model)}
            self.emit("end", end | self.meter.summary(self.tokens))
        weights = checkpoints.weights_hash(self.model.state_dict())
        return Result(self.steps, self.tokens, self.evaluation, weights, self.best)

    @property
    def tokens(self) -> int:
        """How many tokens the steps so far have learned from."""
        return self.ramp.tokens_before(self.step)

    def _accumulation(self, step: int) -> int:
        return self.ramp.batch_tokens(step) // self.job.model.seq_len // (self.micro_batch * self.world.size)

    def _rows(self, path: Path, last_step: int, repeated: str) -> RowLog:
        return RowLog(path, last_step, repeated) if self.world.is_first else NoLog()

    def _loader(self) -> TokenLoader:
        return TokenLoader(
            self.windows,
            self.micro_batch,
            position=self.position,
            rank=self.world.rank,
            world_size=self.world.size,
            device=self.device,
            documents=self.job.train.document_mask,
        )

    def _autocast(self) -> AbstractContextManager[object]:
        return autocast(self.device, self.precision)

    def _ending(self, caught: list[int], until: float) -> MillpondError | None:
        """What the run ends with after this step, if it is to end; it is saved first. All ranks agree on it."""
        reason = self.world.most(caught[0] if caught else TIME_IS_UP if time.monotonic() >= until else 0)
        saved = f"saved at step {self.step} of {self.steps}"
        if reason == TIME_IS_UP:
            return OutOfTime(saved)
        return Interrupted(reason, saved) if reason else None

    def _saves_left(self) -> int:
        """At most how often the rest of the run will save."""
        every = self.job.train.checkpoint_every, self.job.train.eval_every
        due = sum(self.steps // each - self.step // each for each in every if each)
        return due + 1 if self.step < self.steps else 0

    def _announce(self) -> None:
        job = self.job
        self.emit(
            "start",
            {
                "family": job.model.family,
                "parameters": self.model.parameter_count(),
                "device": device_name(self.device),
                "precision": str(self.precision).removeprefix("torch."),
                "steps": self.steps,
                "step": self.step,
                "batch_tokens": self.ramp.batch_tokens(self.step),
                "last_batch_tokens": job.train.batch_tokens,
                "micro_batch": self.micro_batch,
                "accumulation": self._accumulation(self.step),
                "processes": self.world.size,
                "seq_len": job.model.seq_len,
                "epoch_tokens": self.windows.count * job.model.seq_len,
                **self.meter.scale(),
            },
        )

    def _log(self, loader: TokenLoader, grad_norm: torch.Tensor) -> None:
        """One row: the mean loss since the row before, and what the steps between them cost."""
        loss = self.guard.mean_loss()  # the device is waited for here
        self.rollback.tell(self.step, self.position)
        if loss is None:
            return  # all its steps were skipped: the next row tells of them
        row: Row = {
            "step": self.step,
            "tokens": self.tokens,
            "loss": loss,
            "lr": self.lr,
            "grad_norm": grad_norm.item(),
            **self.meter.read(self.step, self.tokens, loader.stats()),
            **self.stepper.counts(),
        }
        self.metrics.write(row)
        rate = max(row["tok_per_s"], 0.1)  # a process that was suspended shows none
        eta_seconds = (self.ramp.tokens - self.tokens) / rate
        self.emit("log", {**row, "steps": self.steps, "eta_seconds": eta_seconds})

    def _roll_back(self, loader: TokenLoader, reason: str) -> None:
        """Go back to the newest checkpoint, and on from there with the windows behind those that led here."""
        bad = self.step
        self.rollback.tell(bad, self.position)
        self.saver.wait()
        saved = checkpoints.load_agreed(self.job.checkpoints, self.world)
        self._restore(self.rollback.begin(bad, reason, saved))
        left_out, self.position = [self.position, loader.position], loader.position
        self.guard.forgive()
        self.metrics.cut_back(self.step)
        self.samples.cut_back(self.step)
        row: Row = {"step": self.step + 1, "rollback_from": bad, "windows_skipped": left_out}
        self.metrics.write(row)
        self.meter.begin(self.step, self.tokens, loader.stats())
        self.emit("rollback", {**row, "reason": reason})

    @property
    def _evaluates(self) -> bool:
        return is_due(self.step, self.job.train.eval_every) or self.step == 0 or self.ramp.ends_at(self.step)

    @property
    def _samples(self) -> bool:
        return self.step > 0 and (is_due(self.step, self.job.train.sample_every) or self.ramp.ends_at(self.step))

    def _evaluate_and_sample(self) -> None:
        """Where this step is due for it. A run that resumes from this step does it again, with the same rows.

        Each evaluation is over the same tokens, so that the losses can be compared; the last step has one over more,
        where validation has more.
        """
        train, last = self.job.train, self.ramp.ends_at(self.step)
        if self._evaluates:
            found = self._evaluate(train.eval_tokens)
            if self.step and self.rollback.calm:  # a model that has learned nothing is no best one
                self._compare(Best(self.step, found.loss, found.tokens))
            if last and found.tokens < self.sources.evaluated_tokens(train.final_eval_tokens):
                self._evaluate(train.final_eval_tokens)
        if self._samples:
            self._sample()

    def _evaluate(self, tokens: int) -> Evaluation:
        self.evaluation = found = measure(
            self.sources,
            self.model,
            tokens,
            self.fit.eval_batch,
            self._autocast,
            document_mask=self.job.train.document_mask,
            world=self.world,
        )
        if not math.isfinite(found.loss):
            self.rollback.refuse(self.step, "the validation loss is not a number")
        row: Row = {"step": self.step, "tokens": self.tokens, **found.row()}
        self.metrics.write(row)
        self.emit("eval", row)
        return found

    def _compare(self, found: Best) -> None:
        """Mark this step as the best when it is: its checkpoint was saved before that could be known.

        Only once that is published: the mark before is of a checkpoint that is there.
        """
        self.best = checkpoints.better(self.best, found)
        if self.best.step == self.step and self.world.is_first:
            self.saver.wait()
            checkpoints.mark_best(self.job.checkpoints, self.best)

    def _sample(self) -> None:
        if not self.world.is_first:
            return
        for prompt in self.job.train.prompts:
            with self._autocast():
                text = generate(self.model, self.sources.tokenizer, prompt, self.job.train.sample_tokens)
            row: Row = {"step": self.step, "prompt": prompt, "text": text}
            self.samples.write(row)
            self.emit("sample", row)

    def _save(self) -> None:
        """Begin to save a checkpoint of this step; everything that led to it is on disk before."""
        self.rollback.saved()
        drawn = rng.tensors(self.world, self.device)
        if not self.world.is_first:
            return
        self.metrics.sync()
        self.samples.sync()
        state = self.optimizers.tensors() | self.stepper.tensors() | drawn
        progress = Progress(
            step=self.step,
            tokens=self.tokens,
            data=self.windows.state(self.position),
            recipe=self.job.recipe,
            identity=self.job.identity,
            tokenizer=self.sources.tokenizer_record,
            parts=self.sources.parts,
            best=self.best,
            seconds=self.meter.seconds,
            energy_kwh=self.meter.kwh,
        )
        self.saver.save(Checkpoint(progress, self.model.state_dict(), state))

    def _remove_surplus(self) -> None:
        if self.world.is_first:
            keep = self.job.train.keep_checkpoints
            checkpoints.remove_surplus(self.job.checkpoints, self.step, self.best, keep)

    def _saved(self, path: Path) -> None:
        self.emit("save", {"step": checkpoints.step_of(path), "path": str(path)})

    def _restore(self, saved: Checkpoint) -> None:
        """Take over everything a checkpoint holds.

        RefusedError when it is of another recipe, CorruptError when it is of other data or another order.
        """
        progress = saved.progress
        self.job.require_same_recipe(progress)
        require_same_tokenizer(progress, self.sources.tokenizer_record)
        if progress.parts != self.sources.parts:
            raise CorruptError(
                f"{self.job.checkpoints}: the checkpoint is of {progress.parts} parts, the run of {self.sources.parts}",
                "going on from it would be neither the one run nor the other",
                "start over with --fresh, or under another --name",
            )
        position = position_of(self.windows, progress.data)
        state = saved.state
        try:
            self.model.load_state_dict(saved.model)
            rng.load_tensors(state, self.world, self.device, self.job.train.seed, progress.step)
            self.stepper.load_tensors(state)
            self.optimizers.load_tensors(state)
        except (KeyError, ValueError, RuntimeError) as error:
            raise CorruptError(
                f"{self.job.checkpoints}: the checkpoint of step {progress.step} does not fit the run: {error}",
                "it was written by another version of millpond, or edited",
                "go on with the version that wrote it, or start over with --fresh",
            ) from error
        self.step, self.position = progress.step, position
        known = self.world.first(lambda: [checkpoints.known_best(self.job.checkpoints, progress)], list[Best | None])
        self.best = known[0]


def _say_nothing(_kind: str, _row: Row) -> None: ...
