"""Training time: the sum of learning rates over optimiser steps."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

__all__ = ["Clock", "expected_end"]


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
