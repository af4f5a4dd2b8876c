"""Training time: the sum of learning rates over optimiser steps."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException


class Clock:
    """Sum of the learning rates of an optimiser's steps; exactly rate × steps while the rate is constant.

    A hook on the optimiser counts each step once, with its learning rate, regardless of the caller and of other
    optimisers, and without the steps that a ``GradScaler`` skips. The largest rate of the parameter groups counts. For
    modules without an optimiser in Lightning, call :meth:`advance` with rate 1 for each batch.
    """

    def __init__(self, before: float = 0.0, start: int = 0, rate: float = 0.0, steps: int = 0) -> None:
        self._before, self._start, self._rate, self.steps = before, start, rate, steps
        self._hook: Any = None

    def state(self) -> tuple[float, int, float, int]:
        """Return the constructor arguments of a clock in this state."""
        return self._before, self._start, self._rate, self.steps

    def attach(self, optimizer: Any) -> bool:
        """Count the steps of an optimiser; return False for None, and for an optimiser without a learning rate."""
        self.detach()
        if hasattr(optimizer, "register_step_pre_hook") and "lr" in next(iter(optimizer.param_groups), ()):
            self._hook = optimizer.register_step_pre_hook(self._count)
        return self._hook is not None

    def detach(self) -> None:
        """Remove the hook from the optimiser."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def advance(self, rate: float) -> None:
        """Count one step with a learning rate."""
        if rate != self._rate:
            self._before, self._start, self._rate = self.time, self.steps, rate
        self.steps += 1

    def step(self, trainer: L.Trainer) -> int:
        """Return the number of optimiser steps of a Trainer so far, without the steps that a ``GradScaler`` skips."""
        # Lightning counts skipped steps (16-mixed), and does not count steps of optimisers that the module calls.
        may_skip = getattr(trainer.precision_plugin, "scaler", None) is not None
        if may_skip and self._hook is not None and len(trainer.optimizers) == 1:
            return self.steps
        return max(trainer.global_step, self.steps)

    @property
    def time(self) -> float:
        """Sum of the learning rates so far."""
        return self._before + self._rate * (self.steps - self._start)

    def _count(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if getattr(optimizer, "found_inf", None):  # GradScaler leaves it to a fused optimiser to skip the step
            return
        self.advance(max(float(group["lr"]) for group in optimizer.param_groups))


def expected_end(trainer: L.Trainer) -> float:
    """Return the number of steps that Lightning estimates, infinite without an estimate."""
    try:
        return trainer.estimated_stepping_batches
    except MisconfigurationException:
        return math.inf
