"""Learning rate, momentum and batch size as pure functions of the recipe and the step: nothing to save, to resume."""

import math
from bisect import bisect_right
from collections.abc import Iterator
from typing import assert_never

import msgspec

from shards.errors import ConfigError
from train.config import EarlierLength, ModelConfig, OptimConfig, TrainConfig, require_consistent

LOWEST_MUON, HIGHEST_ADAMW = 0.002, 0.01  # peak rates beyond which another optimizer's was probably meant


def lr_factor(config: OptimConfig, step: int, steps: int) -> float:
    """What to multiply every peak rate with at `step` (0-based) of `steps`: linear warm-up, then the schedule, which is
    at `final_lr` in the last step.

    `cosine` falls from the end of warm-up on (Loshchilov and Hutter 2017), `linear` and `wsd` over the last
    `decay_fraction` of the run: `linear` in a straight line (trapezoidal; Zhai et al. 2022), `wsd` as 1 minus the
    square root (Haegele et al. 2024); `constant` never falls. What does not fit into a short run is made shorter.
    """
    if config.schedule_rule == 1:
        return _first_rule(config, step, steps)
    warmup, decay = fitted(config, steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = 1.0 - (steps - 1 - step) / decay if decay else float(step >= steps - 1)
    return config.final_lr + (1 - config.final_lr) * _left(config, min(max(progress, 0.0), 1.0))


def fitted(config: OptimConfig, steps: int) -> tuple[int, float]:
    """The steps of warm-up and of decay in a run of `steps`: half of it and the rest where they do not fit."""
    warmup = config.warmup_steps if config.warmup_steps < steps - 1 else steps // 2
    return warmup, min(_decay_asked(config, steps), steps - 1 - warmup)


def _decay_asked(config: OptimConfig, steps: int) -> float:
    """The steps of decay that are asked for; infinite where it is all that warm-up leaves."""
    match config.schedule:
        case "cosine" | "constant":
            return math.inf
        case "linear" | "wsd":
            return config.decay_fraction * steps
        case _:
            assert_never(config.schedule)


def oddities(config: OptimConfig, steps: int) -> Iterator[str]:
    """What a person should know of the rates and the schedule of a run of `steps` before it begins."""
    match config.name:
        case "muon":
            if 0 < config.lr < LOWEST_MUON:
                yield f"optim.lr={config.lr:g} is low for Muon, whose default is 0.025"
        case "adamw":
            if config.lr > HIGHEST_ADAMW:
                yield f"optim.lr={config.lr:g} is high for AdamW, whose rates are about 0.0003 to 0.003"
        case _:
            assert_never(config.name)
    if shorter := misfit(config, steps):
        yield shorter


def misfit(config: OptimConfig, steps: int) -> str:
    """What a run of `steps` makes shorter of the schedule that was asked for; "" when it fits."""
    (warmup, decay), asked = fitted(config, steps), _decay_asked(config, steps)
    fits = warmup == config.warmup_steps and (math.isinf(asked) or decay >= min(asked, steps - 1))
    if fits or config.schedule_rule == 1:
        return ""
    return (
        f"optim.warmup_steps={config.warmup_steps} and the decay of {config.schedule} do not fit into {steps:,} steps: "
        f"warm-up takes {warmup:,}, the decay the last {decay:,.0f}"
    )


def _left(config: OptimConfig, progress: float) -> float:
    """What is left of the peak's distance to `final_lr` after so much of the decay, from 0 to 1."""
    match config.schedule:
        case "constant":
            return 1.0
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            return 1 - progress
        case "wsd":
            return 1 - math.sqrt(progress)
        case _:
            assert_never(config.schedule)


def _first_rule(config: OptimConfig, step: int, steps: int) -> float:
    """For runs that were begun before `schedule_rule`: `final_lr` would come one step after the last."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    match config.schedule:
        case "cosine":
            progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        case "linear" | "wsd" | "constant":
            progress = 1 - min(1.0, (steps - step) / max(1.0, config.decay_fraction * steps))
        case _:
            assert_never(config.schedule)
    return config.final_lr + (1 - config.final_lr) * _left(config, progress)


def momentum(config: OptimConfig, step: int) -> float:
    """Muon's momentum at `step`: from 0.85 to its own over `momentum_warmup` steps (modded-nanogpt)."""
    if step >= config.momentum_warmup:
        return config.momentum
    low = min(0.85, config.momentum)
    return low + (config.momentum - low) * step / config.momentum_warmup


class Ramp:
    """A run's steps: `train.batch_ramp`, then `train.batch_tokens`, each batch size for an equal part of the run.

    The part is of its tokens where `train.tokens` says how long it is, and of its steps where `train.steps` does. In a
    run that was made longer the parts are those of its first length, and the steps beyond have `train.batch_tokens`.
    ConfigError when the recipe's numbers do not fit together.
    """

    def __init__(self, model: ModelConfig, train: TrainConfig) -> None:
        self._sizes = (*train.batch_ramp, train.batch_tokens)
        require_consistent(model, train)
        lengths: list[TrainConfig | EarlierLength] = [*train.earlier, train]
        self.sequences = math.gcd(*self._sizes) // model.seq_len  # what a micro-batch must divide
        self._first_steps, self._first_tokens = [0], [0]
        first, parts = lengths[0], len(self._sizes)
        for number, size in enumerate(self._sizes, 1):
            if first.tokens:
                steps = max(1, (first.tokens * number // parts - self._first_tokens[-1]) // size)
            else:
                steps = first.steps * number // parts - self._first_steps[-1]
            self._first_steps.append(self._first_steps[-1] + steps)
            self._first_tokens.append(self._first_tokens[-1] + steps * size)
        end, tokens = self._first_steps.pop(), self._first_tokens.pop()
        self._planned = [length.steps or end + (length.tokens - tokens) // train.batch_tokens for length in lengths]
        self._until = [length.until for length in train.earlier]
        _refuse_odd_lengths(self._planned, self._until)
        self.steps = self._planned[-1]
        self.tokens = self.tokens_before(self.steps)

    def planned(self, step: int) -> int:
        """How many steps the run was to have when it came to `step` (0-based): what its learning rate depends on."""
        return self._planned[bisect_right(self._until, step)]

    def ends_at(self, step: int) -> bool:
        """Whether the run ends after `step` steps, or did before it was made longer."""
        return step == self.steps or any(
            step == end == until for end, until in zip(self._planned, self._until, strict=False)
        )

    def batch_tokens(self, step: int) -> int:
        """How many tokens `step` (0-based) learns from."""
        return self._sizes[self._part(step)]

    def tokens_before(self, step: int) -> int:
        """How many tokens the steps before `step` have learned from; `step` may be the number of steps."""
        part = self._part(step)
        return self._first_tokens[part] + (step - self._first_steps[part]) * self._sizes[part]

    def _part(self, step: int) -> int:
        return bisect_right(self._first_steps, step) - 1


def rank_share(model: ModelConfig, train: TrainConfig, world_size: int) -> TrainConfig:
    """What one of `world_size` processes does of `train`: as many steps, of batches that much smaller.

    ConfigError when the recipe's numbers do not fit together, or the steps are not divided evenly.
    """
    sequences = Ramp(model, train).sequences
    share, rest = divmod(sequences, world_size)
    if rest:
        fewer = next(size for size in range(min(world_size, sequences), 0, -1) if sequences % size == 0)
        raise ConfigError(
            f"{world_size} processes cannot share {sequences} sequences equally, which all steps are multiples of",
            "the batch must be the same for any number of GPUs",
            f"torchrun --nproc-per-node {fewer} …, or for a new run"
            f" --set train.batch_tokens={-(-train.batch_tokens // (unit := model.seq_len * world_size)) * unit}",
        )
    if train.micro_batch and share % train.micro_batch:
        raise ConfigError(
            f"train.micro_batch is {train.micro_batch}, each of {world_size} processes has {share} sequences of a step",
            "the batch must be the same on every GPU",
            f"choose a divisor of {share}, or 0 to have it chosen",
        )
    return msgspec.structs.replace(
        train,
        batch_tokens=train.batch_tokens // world_size,
        batch_ramp=tuple(size // world_size for size in train.batch_ramp),
        earlier=(),
    )


def _refuse_odd_lengths(planned: list[int], until: list[int]) -> None:
    """Each length is longer than the one before, and was left for it while it lasted."""
    for before, after, left in zip(planned[:-1], planned[1:], until, strict=True):
        if not left <= before < after:
            raise ConfigError(
                f"train.earlier says that {before} steps became {after} after step {left}",
                "a run is made longer before its last step or after it",
                "leave train.earlier to millpond resume RUN --steps N",
            )
    if until != sorted(set(until)):
        raise ConfigError(f"train.earlier: the steps {until} do not increase", "", "leave it to millpond resume")
