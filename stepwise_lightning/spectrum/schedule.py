"""When to measure, and what time it is: time is learning rate × steps."""

from __future__ import annotations

import math

import torch

from stepwise_lightning.errors import UserError


def log_spaced_steps(last_step: int, num_points: int) -> list[int]:
    """Return about ``num_points`` steps, ascending, evenly spaced in the logarithm: 0, 1, 2, …, last_step.

    The step before the last is always among them: it is the last one that has a training loss.
    """
    if last_step < 1 or num_points < 2:
        raise UserError(f"a schedule needs last_step ≥ 1 and num_points ≥ 2, got {last_step} and {num_points}")
    spaced = torch.logspace(0, math.log10(last_step), num_points, dtype=torch.float64).round().long().tolist()
    return sorted({0, *spaced, last_step - 1, last_step})


class Clock:
    """Sums the learning rates of the steps taken; exactly rate × step while the rate is constant."""

    def __init__(self, before: float = 0.0, start: int = 0, rate: float = 0.0) -> None:
        self._before, self._start, self._rate = before, start, rate

    def state(self) -> tuple[float, int, float]:
        """Return the arguments of a clock that goes on from here."""
        return self._before, self._start, self._rate

    def advance(self, step: int, rate: float) -> None:
        """Note the rate with which the step after ``step`` is about to be taken."""
        if rate != self._rate:
            self._before, self._start, self._rate = self.time(step), step, rate

    def time(self, step: int) -> float:
        """Return the sum of the rates of the steps before ``step``."""
        return self._before + self._rate * (step - self._start)
