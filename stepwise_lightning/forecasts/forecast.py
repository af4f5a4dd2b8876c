"""Result of a forecast, with its typical errors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from stepwise_lightning.forecasts.learning_rates import StableRates
from stepwise_lightning.precision import as_float64
from stepwise_lightning.spectrum.record import SpectrumRecord
from stepwise_lightning.spectrum.steps import first_sustained
from stepwise_lightning.theory.loss_derivatives import PairLoss
from stepwise_lightning.theory.loss_signature import loss_properties

T = TypeVar("T")
# Typical relative errors of the step of the first mode and of later modes, before training; NaN: not reliable;
# None, or a loss that is not listed: not measured.
_ERRORS: dict[str, tuple[float, float | None]] = {
    "barlow_twins": (0.06, 0.15),
    "simclr": (0.06, 0.2),
    "vicreg": (0.07, math.nan),
    "spectral_contrastive": (0.06, None),
}
# Typical relative errors of the time until the next mode, during training.
_LIVE_ERRORS = {"barlow_twins": 0.2, "simclr": 0.3, "vicreg": math.nan}
# Share by which feature learning shortens the remaining time at the end of a plateau. SimCLR and VICReg showed no
# regular effect.
_FEATURE_LEARNING_CORRECTION = {"barlow_twins": 0.3}


@dataclass(frozen=True)
class Forecast:
    """Steps at which the modes of an embedding will be learned, assuming frozen features before the last layer.

    ``str()`` returns a table. Steps are optimiser steps since the beginning of training.
    """

    loss: str | PairLoss  #: name in ``stepwise_lightning.losses.LOSSES``, or a function of both views' embeddings
    matrix: str  #: matrix whose eigenvalues the loss drives
    start: int  #: step of the forecast; 0 before training
    max_steps: int  #: last step of training
    learning_rate: float  #: largest learning rate of the remaining steps
    momentum: float
    num_pairs: int  #: number of pairs whose features were used
    #: Step at which each mode is learned, (d,); infinite if not before ``max_steps``; NaN if before ``start`` or if the
    #: mode starts too high to make a step
    step_times: Tensor
    steps: Tensor  #: steps of the simulated trajectory, (K,)
    eigenvalues: Tensor  #: eigenvalues of ``matrix``, (K, d), descending; infinite once training has diverged
    threshold: float  #: θ, a tenth of the largest eigenvalue at the end; modes above it count as learned
    #: ρ of each mode from a small start, (d,), :func:`stepwise_lightning.theory.growth_matrix`; NaN if undefined
    growth_rates: Tensor
    rates: StableRates  #: limit, safe and suggested learning rate; NaN if unknown
    warnings: tuple[str, ...]  #: reasons why the forecast may be wrong or training may fail

    @property
    def num_learned(self) -> int:
        """Number of modes above the threshold at the start."""
        return int((self.eigenvalues[0] > self.threshold).sum())

    @property
    def next_mode(self) -> tuple[int, float]:
        """Next mode to be learned, counted from 1, and its expected step; infinite if no mode follows."""
        mode = self.num_learned
        return mode + 1, float(self.step_times[mode]) if mode < len(self.step_times) else math.inf

    def with_plateau_correction(self, record: SpectrumRecord) -> Forecast:
        """Return a copy whose next step time is corrected for progress along the current plateau.

        See :func:`correct_for_feature_learning`. Returns the forecast itself if ``record``, the record of the run up to
        ``start``, does not contain the step at which the last mode was learned.
        """
        mode, expected = self.next_mode
        if mode == 1 or mode > len(self.step_times) or self.matrix not in record.matrices or len(record) < 2:
            return self
        last = record.eigenvalues(self.matrix)[:, mode - 2 : mode - 1]
        learned_at = float(crossings(record.steps, last, self.threshold))
        if not math.isfinite(learned_at):
            return self
        times = self.step_times.clone()
        times[mode - 1] = correct_for_feature_learning(self.loss, learned_at, self.start, expected)
        return replace(self, step_times=times)

    @property
    def errors(self) -> Tensor:
        """Typical relative error of each step time, (d,), during training of the remaining time; NaN if unknown.

        It is NaN for modes that are not forecast reliably, and for losses whose errors were not measured. Medians
        over runs of small networks: see ``reproduce/figures/forecast.py``.
        """
        first, later = self._typical_errors
        first, later = (math.nan if error is None else error for error in (first, later))
        errors = self.step_times.new_full((len(self.step_times),), later)
        errors[self.num_learned : self.num_learned + 1] = first
        return errors

    @property
    def _typical_errors(self) -> tuple[float | None, float | None]:
        """Typical errors of the next and of later modes; NaN if not reliable, None if not measured."""
        if not self.start:
            return _measured(_ERRORS, self.loss, (None, None))
        live = _measured(_LIVE_ERRORS, self.loss, None)
        return live, None if live is None else math.nan

    def at(self, steps: Tensor) -> Tensor:
        """Return the eigenvalues at steps (T,), interpolated in their logarithm, (T, d); NaN outside the trajectory."""
        tiny = torch.finfo(torch.float64).tiny
        known, logs = self.steps.double(), self.eigenvalues.clamp(min=tiny).log()
        steps = as_float64(steps, "steps").cpu()
        after = torch.searchsorted(known, steps).clamp(1, len(known) - 1)
        share = ((steps - known[after - 1]) / (known[after] - known[after - 1]))[:, None]
        values = (logs[after - 1] + share * (logs[after] - logs[after - 1])).exp()
        outside = (steps < known[0]) | (steps > known[-1])
        return values.masked_fill(outside[:, None], math.nan)

    def reliable_eigenvalues(self, steps: Tensor) -> Tensor:
        """Return the eigenvalues of the k modes with reliable step times at steps (T,), (T, k).

        They are NaN from the expected step of the first mode that is not reliable.
        """
        count, steps = int(self.errors.isfinite().sum()), as_float64(steps, "steps").cpu()
        later = self.step_times[count : count + 1]
        past = (steps[:, None] > later.nan_to_num(nan=-1.0, posinf=math.inf)).any(1)
        return self.at(steps)[:, :count].masked_fill(past[:, None], math.nan)

    def __str__(self) -> str:
        lines = [
            f"{loss_properties(self.loss).title}, learning rate {self.learning_rate:.3g}, momentum {self.momentum:g}, "
            f"{self.num_pairs} pairs, from step {self.start} to {self.max_steps}",
            "mode  learned at step       typical range   share of the steps",
        ]
        for mode, (step, error) in enumerate(zip(self.step_times.tolist(), self.errors.tolist(), strict=True)):
            lines.append(f"{mode + 1:4d}  {self._step_line(mode, step, error)}")
            if math.isinf(step):
                break
        lines.append(self._rates_line())
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])

    def _step_line(self, mode: int, step: float, error: float) -> str:
        if math.isnan(step):
            return "learned" if mode < self.num_learned and self.start else "starts too high to make a step"
        if math.isinf(step):
            return f"after step {self.max_steps}, or never: the network may learn more modes"
        low, high = (self.start + (step - self.start) * (1 + sign * error) for sign in (-1, 1))
        typical = self._typical_errors[mode > self.num_learned]
        span = (
            "not measured" if typical is None else "not reliable" if math.isnan(error) else f"{low:.0f} to {high:.0f}"
        )
        return f"{step:15.0f}  {span:>18}   {step / self.max_steps:18.1%}"

    def _rates_line(self) -> str:
        if math.isnan(self.rates.suggested):
            return "learning rate: no limit known, because no mode grows from a small start"
        if math.isnan(self.rates.limit):
            limit = "no limit: the loss does not depend on the length of embeddings"
        elif math.isinf(self.rates.limit):
            limit = "no limit found"
        else:
            limit = f"diverges above {self.rates.limit:.2g}, safe below {self.rates.safe:.2g}"
        return f"learning rate: {limit}; suggested {self.rates.suggested:.2g}"


def correct_for_feature_learning(loss: str | PairLoss, learned_at: float, step: float, expected: float) -> float:
    """Return the expected step of the next mode, corrected for feature learning.

    While a mode rises, features move towards it, and it grows faster than with frozen features. For Barlow Twins the
    remaining time shrinks by 0.3 times the elapsed share of the plateau. This is measured, not derived: see
    docs/results.md. ``learned_at`` is the step at which the last mode was learned; ``expected`` is the step of the next
    mode in a simulation with frozen features and may be infinite.
    """
    passed, remaining = max(step - learned_at, 0.0), expected - step
    if not 0 < remaining < math.inf:
        return expected
    correction = _measured(_FEATURE_LEARNING_CORRECTION, loss, 0.0)
    return step + remaining * (1 - correction * passed / (passed + remaining))


def _measured(table: Mapping[str, T], loss: str | PairLoss, default: T) -> T:
    return table.get(loss, default) if isinstance(loss, str) else default


def crossings(steps: Tensor, eigenvalues: Tensor, threshold: float) -> Tensor:
    """Return the step at which each eigenvalue, (K, d), exceeds a threshold for three samples, (d,).

    Steps are interpolated linearly in the logarithm; NaN for eigenvalues that start above the threshold, infinite for
    those that never exceed it.
    """
    logs = eigenvalues.clamp(min=torch.finfo(torch.float64).tiny).log() - math.log(threshold)
    times = eigenvalues.new_full((eigenvalues.shape[1],), math.inf, dtype=torch.float64)
    for mode, path in enumerate(eigenvalues.T):
        index = first_sustained(path > threshold)
        if path[0] > threshold:
            times[mode] = math.nan
        elif index is not None:
            before, after = logs[index - 1 : index + 1, mode]
            start, end = steps[index - 1 : index + 1].tolist()
            times[mode] = start + (end - start) * float(-before / (after - before))
    return times
