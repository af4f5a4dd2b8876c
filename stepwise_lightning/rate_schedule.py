"""Learning-rate schedule of the LightningModules: linear warm-up and cosine decay."""

from __future__ import annotations

import math


def rate_factor(step: int, warmup_steps: int, num_steps: float) -> float:
    """Return the factor of the learning rate for the optimiser step after ``step`` steps.

    It is (step + 1) / warmup_steps during the warm-up, then (1 + cos π p) / 2, where p grows from 0 after the warm-up
    to 1 at ``num_steps``. With ``num_steps = inf`` it is 1 after the warm-up.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if math.isinf(num_steps):
        return 1.0
    progress = (step - warmup_steps) / max(num_steps - warmup_steps, 1)
    return (1 + math.cos(math.pi * min(progress, 1))) / 2
