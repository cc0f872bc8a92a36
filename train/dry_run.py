"""Some real steps before the run, to say what all of them will take."""

from typing import NamedTuple

import torch

from shards.errors import HostError
from train.config import ModelConfig, OptimConfig, TrainConfig
from train.machine.memory import is_out_of_memory
from train.micro_batch import Fit
from train.schedule import Ramp
from train.state.saver import checkpoint_nbytes
from train.telemetry.power import GpuPower, gpu_power
from train.trial import Trial

STEPS = 20
SECONDS = 30.0  # for them, or for as many micro-batches as fit in it: on a CPU one step can take hours
EVALUATION_SPEED = 3.0  # forward alone is a third of the arithmetic of forward and backward


class DryRun(NamedTuple):
    """What was measured, on `micro_batches` of `size` sequences of random tokens each, in `steps` whole steps.

    `seconds` is what the run's steps and evaluations will take, `tok_per_s` that of its steps; `watts` is the GPU's
    while it was at it, None where it does not tell. `checkpoint_bytes` is one checkpoint's.
    """

    size: int
    micro_batches: int
    steps: int
    tok_per_s: float
    seconds: float
    watts: float | None
    checkpoint_bytes: int


def dry_run(
    model: ModelConfig,
    optim: OptimConfig,
    train: TrainConfig,
    vocab_size: int,
    device: torch.device,
    fit: Fit,
    val_tokens: int,
) -> DryRun:
    """Train for at most 20 steps or about 30 seconds, whichever is less. HostError when the micro-batch does not fit.

    Loading is left out: it is hidden behind the steps. So are compiling, samples and saves.
    """
    trial, ramp = Trial(model, optim, train, vocab_size, device), Ramp(model, train)
    power = gpu_power([device])
    try:
        timed = _run(trial, ramp, fit.micro_batch, power)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise HostError(
            f"out of memory with {fit.micro_batch} sequences at once",
            "training would continue with fewer, at a speed that is not known",
            "--set train.micro_batch=0",
        ) from error
    finally:
        if power:
            power.close()
    micro_tokens = timed.size * model.seq_len
    training = ramp.tokens / micro_tokens * timed.a_micro_batch + ramp.steps * timed.an_update
    evaluation_rate = max(fit.eval_rates.values(), default=EVALUATION_SPEED * micro_tokens / timed.a_micro_batch)
    return DryRun(
        size=timed.size,
        micro_batches=timed.micro_batches,
        steps=timed.steps,
        tok_per_s=ramp.tokens / training,
        seconds=training + evaluation_tokens(train, ramp.steps, val_tokens) / evaluation_rate,
        watts=timed.watts,
        checkpoint_bytes=checkpoint_nbytes(trial.model, trial.stepper.optimizers),
    )


def evaluation_tokens(train: TrainConfig, steps: int, val_tokens: int) -> int:
    """How many tokens all evaluations of a run of `steps` read together, where validation has `val_tokens`."""
    count = 1 + (-(-steps // train.eval_every) if train.eval_every else 1)
    short, final = min(train.eval_tokens, val_tokens), min(train.final_eval_tokens, val_tokens)
    return count * short + (final if final > short else 0)


class _Timed(NamedTuple):
    size: int
    micro_batches: int
    steps: int
    a_micro_batch: float
    an_update: float
    watts: float | None


def _run(trial: Trial, ramp: Ramp, micro_batch: int, power: GpuPower | None) -> _Timed:
    """Micro-batches and updates as training has them, timed as one; one of each before, alone, to know how many.

    Where a big micro-batch is no faster and takes minutes, on a CPU, one sequence is measured in its place.
    """
    stepper = trial.stepper
    stepper.optimizers.schedule(0, ramp.steps)
    if trial.device.type != "cuda":
        batch, began = trial.batch(1), trial.now()
        stepper.learn(batch)
        if micro_batch * (trial.now() - began) > SECONDS:
            micro_batch = 1
    if trial.device.type == "cuda" or micro_batch > 1:
        batch = trial.batch(micro_batch)
        stepper.learn(batch)
    trial.update()
    moments = [trial.now()]
    stepper.learn(batch)
    moments.append(trial.now())
    trial.update()
    moments.append(trial.now())
    first, an_update = moments[1] - moments[0], moments[2] - moments[1]
    accumulation = ramp.batch_tokens(ramp.steps - 1) // (micro_batch * trial.model.config.seq_len)
    count = max(1, min(STEPS * accumulation, int(SECONDS / (first + an_update / accumulation))))
    joules, began = power.joules() if power else None, trial.now()
    for number in range(1, count + 1):
        stepper.learn(batch)
        if number % accumulation == 0:
            trial.update()
    seconds = trial.now() - began
    used = power.joules() if power else None
    steps = count // accumulation
    return _Timed(
        micro_batch,
        count,
        steps,
        max(seconds - steps * an_update, seconds / 10) / count,
        an_update,
        None if joules is None or used is None else (used - joules) / seconds,
    )
