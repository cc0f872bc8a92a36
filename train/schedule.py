"""Learning rate and momentum as pure functions of the step: nothing to save, nothing to resume."""

import math

from train.config import OptimConfig


def lr_factor(config: OptimConfig, step: int, steps: int) -> float:
    """What to multiply every peak rate with at `step` (0-based) of `steps`: warm-up from near 0, then the schedule.

    `cosine` falls to `final_lr` from the end of warm-up on (Loshchilov and Hutter 2017), `linear` over the last
    `decay_fraction` of the run (trapezoidal; Zhai et al. 2022), `constant` never.
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    left = (steps - step) / max(1.0, config.decay_fraction * steps)
    return config.final_lr + (1 - config.final_lr) * min(1.0, left)


def momentum(config: OptimConfig, step: int) -> float:
    """Muon's momentum at `step`: from 0.85 to its own over `momentum_warmup` steps (modded-nanogpt)."""
    if step >= config.momentum_warmup:
        return config.momentum
    low = min(0.85, config.momentum)
    return low + (config.momentum - low) * step / config.momentum_warmup
