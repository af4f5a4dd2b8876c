"""Schedule of measurements: log-spaced optimiser steps."""

from __future__ import annotations

import math

import torch

from stepwise_lightning.errors import UserError

# Assumed length of a run of unknown length.
_DEFAULT_LENGTH = 100_000


def log_spaced_steps(last_step: int, num_points: int) -> list[int]:
    """Return about ``num_points`` steps, ascending, evenly spaced in the logarithm: 0, 1, 2, …, last_step.

    The step before the last is included: it is the last one with a training loss.
    """
    if last_step < 1 or num_points < 2:
        raise UserError(f"a schedule needs last_step ≥ 1 and num_points ≥ 2, got {last_step} and {num_points}")
    spaced = torch.logspace(0, math.log10(last_step), num_points, dtype=torch.float64).round().long().tolist()
    return sorted({0, *spaced, last_step - 1, last_step})


class Schedule:
    """Log-spaced steps up to the expected end of training, continued with the same ratio beyond it.

    Args:
        last_step: the expected end of training, infinite if unknown. Several optimisers, streams without a length or a
            larger ``max_steps`` can extend a run.
        num_points: approximate number of measurements up to there.

    """

    def __init__(self, last_step: float, num_points: int) -> None:
        known = math.isfinite(last_step) and last_step >= 1
        length = int(last_step) if known else _DEFAULT_LENGTH
        self._steps = log_spaced_steps(length, num_points)[::-1]
        if not known:  # no measurements before an assumed end
            self._steps = [step for step in self._steps if step < length - 1]
        self._ratio = max(length, 2) ** (1 / (num_points - 1))

    def is_due(self, step: int) -> bool:
        """Return True once for each scheduled step that ``step`` has reached; removes the steps up to ``step``."""
        due = False
        while self._steps and self._steps[-1] <= step:
            self._steps.pop()
            due = True
        if not self._steps:
            self._steps = [max(step + 1, math.ceil(step * self._ratio))]
        return due
