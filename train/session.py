"""Everything one run is made of, set up once and restored from its newest valid checkpoint."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch

from shards.errors import CorruptError
from train.data.loader import TokenLoader
from train.data.sources import OpenSources
from train.data.windows import position_of
from train.evaluate import Evaluation
from train.events import Report, Started
from train.job import Job, require_same_tokenizer
from train.machine.compile import compile_model, wants_compile
from train.machine.device import autocast, device_name, devices_here, loss_scaler, pick_device, resolve_precision
from train.machine.memory import cap_memory
from train.machine.ranks import World
from train.micro_batch import Fit, best_fit
from train.model.gpt import Model
from train.optim.groups import Optimizers
from train.schedule import Ramp, rank_share
from train.state import checkpoint as checkpoints
from train.state.checkpoint import Best, Checkpoint, Progress, Stateful
from train.state.guard import Guard
from train.state.rng import Generators
from train.state.rollback import Rollback
from train.state.saver import Saver, checkpoint_nbytes, require_room
from train.step import Stepper
from train.telemetry.meter import Meter
from train.telemetry.metrics import RowLog
from train.telemetry.power import gpu_power


@dataclass(slots=True)
class RunState:
    """What changes from step to step: steps done, windows read, the best and the newest evaluation."""

    step: int = 0
    position: int = 0
    best: Best | None = None
    evaluation: Evaluation | None = None


class Output(NamedTuple):
    """Where a run writes: its two logs, its checkpoints, and who is told of events."""

    metrics: RowLog
    samples: RowLog
    saver: Saver
    report: Report


class Session:
    """The parts of one run on this rank.

    All ranks of `world` build the same model and restore the same checkpoint; rank 0 alone writes.
    """

    def __init__(self, job: Job, world: World | None = None) -> None:
        self.job, self.world = job, world or World()
        self.ramp = Ramp(job.model, job.train)
        self.device = pick_device(job.train.device)
        self.precision = resolve_precision(job.train, self.device)
        self.sources = OpenSources(job.sources, job.model.seq_len, verify="hash" if self.world.is_first else "size")
        self.windows = self.sources.training(job.train)
        vocab_size = self.sources.tokenizer.vocab_size
        share = rank_share(job.model, job.train, self.world.size)
        self.fit = self.world.first(
            lambda: best_fit(job.model, job.optim, share, vocab_size, self.device, job.fits), Fit
        )
        if self.device.type == "cuda":
            cap_memory(self.device)
        torch.manual_seed(job.train.seed)
        self.model = Model(job.model, vocab_size).to(self.device)
        self.model.checkpoint_activations = job.train.checkpoint_activations
        if wants_compile(job.train, self.device):
            compile_model(self.model)
        self.optimizers = Optimizers(self.model, job.optim)
        self.guard = Guard(self.device, job.train.spike_z)
        scaler = loss_scaler(self.device, self.precision)
        self.stepper = Stepper(
            self.model, self.optimizers, job.optim.clip, self.autocast, scaler, self.guard, self.world
        )
        power = gpu_power(devices_here(self.device)) if self.world.is_first else None
        price, processes = job.train.kwh_price, self.world.size
        self.meter = Meter(job.model, vocab_size, self.device, self.precision, power, price, processes)
        self.rollback = Rollback(self.guard, self.model, job.optim, job.train, self.ramp)
        Generators(self.world, self.device, job.train.seed).seed_apart()
        self.state = RunState()
        if saved := checkpoints.load_latest_on_all_ranks(job.checkpoints, self.world):
            self.restore(saved)
            self.meter.add_earlier(saved.progress.seconds, saved.progress.energy_kwh)
        if self.world.is_first:
            nbytes = checkpoint_nbytes(self.model, self.optimizers)
            require_room(job.checkpoints, nbytes, job.train.keep_checkpoints, self._saves_left())

    @property
    def tokens(self) -> int:
        """How many tokens the steps so far have learned from."""
        return self.ramp.tokens_before(self.state.step)

    @property
    def epochs(self) -> float:
        """How many times the run reads each training token."""
        return self.ramp.tokens / (self.windows.count * self.job.model.seq_len)

    @property
    def accumulation(self) -> int:
        """How many micro-batches of this rank the next step has."""
        sequences = self.ramp.batch_tokens(self.state.step) // self.job.model.seq_len
        return sequences // (self.fit.micro_batch * self.world.size)

    def autocast(self) -> AbstractContextManager[object]:
        """Compute in the run's precision while the weights stay fp32."""
        return autocast(self.device, self.precision)

    def loader(self) -> TokenLoader:
        """Batches from the run's position on."""
        return TokenLoader(
            self.windows,
            self.fit.micro_batch,
            position=self.state.position,
            rank=self.world.rank,
            world_size=self.world.size,
            device=self.device,
            documents=self.job.train.document_mask,
        )

    def started(self) -> Started:
        """What is reported before the first step."""
        model, train = self.job.model, self.job.train
        return Started(
            family=model.family,
            parameters=self.model.parameter_count(),
            device=device_name(self.device),
            precision=str(self.precision).removeprefix("torch."),
            steps=self.ramp.steps,
            step=self.state.step,
            batch_tokens=self.ramp.batch_tokens(self.state.step),
            last_batch_tokens=train.batch_tokens,
            micro_batch=self.fit.micro_batch,
            accumulation=self.accumulation,
            processes=self.world.size,
            seq_len=model.seq_len,
            epoch_tokens=self.windows.count * model.seq_len,
            flops_per_token=self.meter.flops_per_token,
            peak_flops=self.meter.peak.flops,
            peak_source=self.meter.peak.source,
        )

    def checkpoint(self) -> Checkpoint:
        """The run as it is now. All ranks must ask for it together."""
        progress = Progress(
            step=self.state.step,
            tokens=self.tokens,
            data=self.windows.state(self.state.position),
            recipe=self.job.recipe,
            identity=self.job.identity,
            tokenizer=self.sources.tokenizer_record,
            parts=self.sources.parts,
            best=self.state.best,
            seconds=self.meter.seconds,
            energy_kwh=self.meter.kwh,
        )
        state = checkpoints.gather(self._parts(self.state.step))
        return Checkpoint(progress, self.model.state_dict(), state)

    def restore(self, saved: Checkpoint) -> None:
        """Take over everything a checkpoint holds.

        RefusedError when it is of another recipe, CorruptError when it is of other data or another order.
        """
        progress = saved.progress
        self.job.require_same_recipe(progress)
        require_same_tokenizer(progress, self.sources.tokenizer_record)
        if progress.parts != self.sources.parts:
            raise CorruptError(
                f"{self.job.checkpoints}: the checkpoint is of {progress.parts} parts, the run of {self.sources.parts}",
                "resuming would mix two different configurations",
                "start over with --fresh, or under another --name",
            )
        position = position_of(self.windows, progress.data)
        try:
            self.model.load_state_dict(saved.model)
            checkpoints.scatter(saved.state, self._parts(progress.step))
        except (KeyError, ValueError, RuntimeError) as error:
            raise CorruptError(
                f"{self.job.checkpoints}: the checkpoint of step {progress.step} does not fit the run: {error}",
                "it was written by another version of millpond, or edited",
                "resume with the version that wrote it, or start over with --fresh",
            ) from error
        known = self.world.first(lambda: [checkpoints.known_best(self.job.checkpoints, progress)], list[Best | None])
        self.state.step, self.state.position, self.state.best = progress.step, position, known[0]

    def _parts(self, step: int) -> dict[str, Stateful]:
        """What has tensors of its own in a checkpoint of `step`, by the name they have there."""
        generators = Generators(self.world, self.device, self.job.train.seed, step)
        return {"guard": self.guard, "scaler": self.stepper, "rng": generators, "": self.optimizers}

    def _saves_left(self) -> int:
        """At most how often the rest of the run will save."""
        every, step = (self.job.train.checkpoint_every, self.job.train.eval_every), self.state.step
        due = sum(self.ramp.steps // each - step // each for each in every if each)
        return due + 1 if step < self.ramp.steps else 0
