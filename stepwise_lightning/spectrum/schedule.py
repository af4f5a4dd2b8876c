"""When to measure, and what time it is: time is learning rate × steps."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from stepwise_lightning.errors import UserError

# How long a run is taken to be that does not say.
_LONG = 100_000


def log_spaced_steps(last_step: int, num_points: int) -> list[int]:
    """Return about ``num_points`` steps, ascending, evenly spaced in the logarithm: 0, 1, 2, …, last_step.

    The step before the last is always among them: it is the last one that has a training loss.
    """
    if last_step < 1 or num_points < 2:
        raise UserError(f"a schedule needs last_step ≥ 1 and num_points ≥ 2, got {last_step} and {num_points}")
    spaced = torch.logspace(0, math.log10(last_step), num_points, dtype=torch.float64).round().long().tolist()
    return sorted({0, *spaced, last_step - 1, last_step})


class Schedule:
    """The steps at which to measure: log-spaced up to the expected end, and on in the same manner if it is passed.

    Args:
        last_step: the expected end of training, which several optimisers, streams without a length or a raised
            ``max_steps`` can prove wrong; infinite where it is not known.
        num_points: about how many measurements to make up to there.

    """

    def __init__(self, last_step: float, num_points: int) -> None:
        known = math.isfinite(last_step) and last_step >= 1
        length = int(last_step) if known else _LONG
        self._steps = log_spaced_steps(length, num_points)[::-1]
        if not known:  # there is no end to be near
            self._steps = [step for step in self._steps if step < length - 1]
        self._ratio = max(length, 2) ** (1 / (num_points - 1))

    def is_due(self, step: int) -> bool:
        """Return whether ``step`` is on the schedule, or beyond what is; asked again, the next one is looked at."""
        due = False
        while self._steps and self._steps[-1] <= step:
            self._steps.pop()
            due = True
        if not self._steps:
            self._steps = [max(step + 1, math.ceil(step * self._ratio))]
        return due


class Clock:
    """Sums the learning rates of an optimiser's steps; exactly rate × steps while the rate is constant.

    It listens to the optimiser itself, so that it counts each of its steps once, and with the rate it was taken with,
    whatever calls it and however many others there are. Of several parameter groups the largest rate counts. Without
    an optimiser (a module that keeps its own) time is the number of batches, as at a rate of 1.
    """

    def __init__(self, before: float = 0.0, start: int = 0, rate: float = 0.0, steps: int = 0) -> None:
        self._before, self._start, self._rate, self.steps = before, start, rate, steps
        self._hook: Any = None

    def state(self) -> tuple[float, int, float, int]:
        """Return the arguments of a clock that goes on from here."""
        return self._before, self._start, self._rate, self.steps

    def listen(self, optimizer: torch.optim.Optimizer) -> None:
        """Count the steps of an optimiser."""
        self.stop()
        self._hook = optimizer.register_step_pre_hook(self._count)

    def stop(self) -> None:
        """Count no more."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def advance(self, rate: float) -> None:
        """Count one step at a learning rate."""
        if rate != self._rate:
            self._before, self._start, self._rate = self.time, self.steps, rate
        self.steps += 1

    @property
    def time(self) -> float:
        """The sum of the rates of the steps so far."""
        return self._before + self._rate * (self.steps - self._start)

    def _count(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.advance(max(float(group["lr"]) for group in optimizer.param_groups))


def expected_end(trainer: L.Trainer) -> float:
    """Return the number of steps that Lightning expects, infinite where it cannot tell."""
    try:
        return trainer.estimated_stepping_batches
    except MisconfigurationException:  # it cannot tell
        return math.inf
