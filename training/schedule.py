"""Learning-rate schedules: pure functions of the step."""

from __future__ import annotations

import math

from .settings import OptimizerSettings


def learning_rate(base: float, step: int, total: int, settings: OptimizerSettings) -> float:
    """The rate of optimizer step ``step`` (0-based) of ``total``: linear warm-up, then the named schedule."""
    warmup = settings.warmup_steps
    if step < warmup:
        return base * (step + 1) / warmup
    if settings.schedule == "cosine":
        progress = (step - warmup) / max(1, total - warmup)
        return base * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return base
