"""Learning rate and momentum as pure functions of the step: nothing to save, nothing to resume."""

import math
from typing import assert_never

from train.config import OptimConfig


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
    """As runs that were begun before `schedule_rule` go on: `final_lr` would come one step after the last."""
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
