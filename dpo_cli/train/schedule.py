"""Learning rate by step: pure functions of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from typing import Literal

ScheduleName = Literal["linear", "cosine", "constant"]


def learning_rate(
    step: int,
    *,
    schedule: ScheduleName,
    peak: float,
    warmup_steps: int,
    total_steps: int,
    final_fraction: float,
) -> float:
    """The learning rate of step `step`, counted from 0.

    Rises linearly over `warmup_steps` (the first step already moves), then falls to peak * final_fraction, which the
    step after the last would reach, along a line or half a cosine; `constant` stays at the peak.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    remaining = 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return peak * (final_fraction + (1 - final_fraction) * remaining)
