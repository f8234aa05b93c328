"""The learning rate as a pure function of the step, so that resuming needs no scheduler state."""

import math

from engine.config import Settings


def learning_rate(settings: Settings, step: int, total_steps: int) -> float:
    """Rate of step `step` (from 0): a linear rise over warmup_steps, then linear, cosine or constant to the end."""
    peak, warmup = settings.learning_rate, settings.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if settings.lr_scheduler_type == "constant":
        return peak
    progress = (step - warmup) / max(1, total_steps - warmup)
    if settings.lr_scheduler_type == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (1 - progress)
