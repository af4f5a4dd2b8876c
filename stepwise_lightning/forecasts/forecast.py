"""What a forecast says, and how sure it is of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stepwise_lightning.forecasts.learning_rates import StableRates
from stepwise_lightning.losses import LOSSES
from stepwise_lightning.spectrum.record import SpectrumRecord

__all__ = ["Forecast", "crossings", "correct_for_feature_learning"]

# Typical relative error of the first mode's step and of later ones', before training; NaN is not promised.
_ERRORS = {"barlow_twins": (0.06, 0.15), "simclr": (0.06, 0.2), "vicreg": (0.07, math.nan)}
# Of the time that remains until the next mode, while training goes on.
_LIVE_ERRORS = {"barlow_twins": 0.2, "simclr": 0.3, "vicreg": math.nan}
# By which share features that move towards a rising mode shorten what remains at the end of a plateau; SimCLR's and
# VICReg's showed nothing as regular.
_FEATURE_LEARNING_CORRECTION = {"barlow_twins": 0.3}


@dataclass(frozen=True)
class Forecast:
    """When each mode of an embedding will be learned, were the features before its last layer to stay.

    ``str()`` of it is a table. Steps are optimiser steps since the beginning of training.
    """

    loss: str
    """``barlow_twins``, ``vicreg`` or ``simclr``."""
    start: int
    """The step at which it was made; 0 before training."""
    max_steps: int
    """Where training ends."""
    learning_rate: float
    """The largest to come."""
    momentum: float
    num_pairs: int
    """On how many pairs it rests."""
    step_times: Tensor
    """(d,): when each mode is learned; infinite if not before ``max_steps``, NaN if it was before ``start``, or starts
    too high to make a step."""
    steps: Tensor
    """(K,), of the trajectory."""
    eigenvalues: Tensor
    """(K, d), descending, of the matrix in which steps of this loss are counted, see ``matrix``; infinite where
    training diverges."""
    threshold: float
    """θ, above which an eigenvalue is learned: a tenth of the largest at the end."""
    growth_rates: Tensor
    """ρ of each mode from a small start, (d,), :func:`stepwise_lightning.theory.growth_matrix`; NaN for none."""
    rates: StableRates
    """The learning rate above which training diverges, a safe one, and the suggested one; NaN where not known."""
    warnings: tuple[str, ...]
    """Why it may be wrong, or training may fail."""

    @property
    def matrix(self) -> str:
        """In which matrix the steps of this loss are counted."""
        return LOSSES[self.loss].driven_matrix

    @property
    def largest_learning_rate(self) -> float:
        """Above it training diverges; NaN where no limit is known (SimCLR has none)."""
        return self.rates.limit

    @property
    def suggested_learning_rate(self) -> float:
        """One that is as large as has been found to train well."""
        return self.rates.suggested

    @property
    def num_learned(self) -> int:
        """Modes above the threshold at the start."""
        return int((self.eigenvalues[0] > self.threshold).sum())

    @property
    def next_mode(self) -> tuple[int, float]:
        """The next mode to be learned, counted from 1, and the step at which it is due; infinite for not any more."""
        mode = self.num_learned
        return mode + 1, float(self.step_times[mode]) if mode < len(self.step_times) else math.inf

    def with_plateau_correction(self, record: SpectrumRecord) -> Forecast:
        """Return a copy whose next step time is corrected for progress along the current plateau.

        It stays as it is where they do not show when the last mode was learned.

        Args:
            record: of the run until then, in optimiser steps.

        """
        mode, due = self.next_mode
        if mode == 1 or mode > len(self.step_times) or self.matrix not in record.matrices or len(record) < 2:
            return self
        last = record.eigenvalues(self.matrix)[:, mode - 2 : mode - 1]
        learned_at = float(crossings(record.steps, last, self.threshold))
        if not math.isfinite(learned_at):
            return self
        times = self.step_times.clone()
        times[mode - 1] = correct_for_feature_learning(self.loss, learned_at, self.start, due)
        return replace(self, step_times=times)

    @property
    def errors(self) -> Tensor:
        """Typical relative error of each step time (of the time until then, during training), (d,); NaN: no promise.

        Medians over runs of small networks: see ``reproduce/figures/forecast.py``.
        """
        first, later = _ERRORS[self.loss]
        if self.start:
            first, later = _LIVE_ERRORS[self.loss], math.nan
        errors = torch.full((len(self.step_times),), later, dtype=torch.float64)
        errors[self.num_learned : self.num_learned + 1] = first
        return errors

    def at(self, steps: Tensor) -> Tensor:
        """Return the eigenvalues at some steps, (T,) to (T, d), interpolated in their logarithm; NaN outside."""
        tiny = torch.finfo(torch.float64).tiny
        known, logs = self.steps.double(), self.eigenvalues.clamp(min=tiny).log()
        after = torch.searchsorted(known, steps.double()).clamp(1, len(known) - 1)
        share = ((steps - known[after - 1]) / (known[after] - known[after - 1]))[:, None]
        values = (logs[after - 1] + share * (logs[after] - logs[after - 1])).exp()
        outside = (steps < known[0]) | (steps > known[-1])
        return values.masked_fill(outside[:, None], math.nan)

    def reliable_eigenvalues(self, steps: Tensor) -> Tensor:
        """Return the eigenvalues at some steps, (T,) to (T, k), as far as they are promised.

        That is of the modes that are, k of them, and until the first of the others is due; then NaN.
        """
        count = int(self.errors.isfinite().sum())
        later = self.step_times[count : count + 1]
        past = (steps[:, None] > later.nan_to_num(nan=-1.0, posinf=math.inf)).any(1)
        return self.at(steps)[:, :count].masked_fill(past[:, None], math.nan)

    def __str__(self) -> str:
        lines = [
            f"{LOSSES[self.loss].title}, learning rate {self.learning_rate:.3g}, momentum {self.momentum:g}, "
            f"{self.num_pairs} pairs, from step {self.start} to {self.max_steps}",
            "mode  learned at step       typical range   share of the steps",
        ]
        for mode, (step, error) in enumerate(zip(self.step_times.tolist(), self.errors.tolist(), strict=True)):
            if math.isnan(step):
                text = "learned" if mode < self.num_learned and self.start else "starts too high to make a step"
                lines.append(f"{mode + 1:4d}  {text}")
            elif math.isinf(step):
                lines.append(f"{mode + 1:4d}  after step {self.max_steps}, or never: the network may learn more modes")
                break
            else:
                low, high = (self.start + (step - self.start) * (1 + sign * error) for sign in (-1, 1))
                span = "not promised" if math.isnan(error) else f"{low:.0f} to {high:.0f}"
                lines.append(f"{mode + 1:4d}  {step:15.0f}  {span:>18}   {step / self.max_steps:18.1%}")
        lines.append(self._told_rates())
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])

    def _told_rates(self) -> str:
        if math.isnan(self.rates.suggested):
            return "learning rate: no mode grows from a small start, so that no limit is known"
        if math.isnan(self.rates.limit):
            limit = "no limit: cosine similarity does not see the length of embeddings"
        elif math.isinf(self.rates.limit):
            limit = "no limit found"
        else:
            limit = f"diverges above {self.rates.limit:.2g}, safe below {self.rates.safe:.2g}"
        return f"learning rate: {limit}; suggested {self.rates.suggested:.2g}"


def correct_for_feature_learning(loss: str, learned_at: float, step: float, due: float) -> float:
    """Return when the next mode is due, where ``due`` is what features that stay allow.

    They do not stay: while a mode rises, they move towards it, and it grows faster than at first. Of Barlow Twins the
    time that remains is shorter by 0.3 times the share of the plateau that has passed. This is measured, not derived:
    see docs/results.md.

    Args:
        loss: of the module.
        learned_at: the step at which the last mode was learned.
        step: the step at which this is said.
        due: the step at which a simulation of the last layer learns the next one; perhaps infinite.

    """
    passed, remaining = max(step - learned_at, 0.0), due - step
    if not 0 < remaining < math.inf:
        return due
    return step + remaining * (1 - _FEATURE_LEARNING_CORRECTION.get(loss, 0.0) * passed / (passed + remaining))


def crossings(steps: Tensor, eigenvalues: Tensor, threshold: float) -> Tensor:
    """Return when each eigenvalue, (K, d), passes a threshold for three samples, (d,), linear in its logarithm.

    NaN for those that are above it at the first sample, infinite for those that never are.
    """
    above = torch.nn.functional.pad(eigenvalues > threshold, (0, 0, 0, 2), value=True)
    sustained = above[:-2] & above[1:-1] & above[2:]
    logs = eigenvalues.clamp(min=torch.finfo(torch.float64).tiny).log() - math.log(threshold)
    times = torch.full((eigenvalues.shape[1],), math.inf, dtype=torch.float64)
    for mode in range(eigenvalues.shape[1]):
        if bool(eigenvalues[0, mode] > threshold):
            times[mode] = math.nan
        elif bool(sustained[:, mode].any()):
            index = int(sustained[:, mode].long().argmax())
            before, after = logs[index - 1, mode], logs[index, mode]
            start, end = steps[index - 1 : index + 1].tolist()
            times[mode] = start + (end - start) * float(-before / (after - before))
    return times
