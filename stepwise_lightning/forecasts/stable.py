r"""Up to which learning rate a last layer trains, and which one to take.

Legend
    γ_1     largest eigenvalue of the features' cross-correlation Γ
    ρ_1     largest eigenvalue of the growth matrix H
    η       learning rate; x = ηρ_1, what drives the first mode at each step
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from stepwise_lightning.forecasts.training import Training
from stepwise_lightning.theory.last_layer import LastLayer
from stepwise_lightning.theory.stability import stability_limits

__all__ = ["StableRates", "stable_rates"]

# Shares of what is safe, and drives, that have been found to train well (docs/theory.md).
_SHARE, _DRIVE, _COSINE_DRIVE = 0.25, 0.4, 0.1
_STEPS, _DOUBLINGS, _HALVINGS = 300, 12, 4


class StableRates(NamedTuple):
    """Learning rates; NaN where none is known."""

    limit: float
    """Above it training diverges."""
    safe: float
    """Below it no batch and no start diverges."""
    suggested: float


def stable_rates(training: Training, layer: LastLayer, h1: Tensor, h2: Tensor, fastest: float) -> StableRates:
    """Return the learning rates of a last layer on features that stay.

    Analytical Barlow Twins has closed limits (:func:`stepwise_lightning.theory.stability.stability_limits`): the limit
    is where half of all small starts diverge, with the γ_1 of all pairs; what is safe is that with the γ_1 of the batch
    in which it is largest. Of VICReg, and of Barlow Twins normalised, training is simulated with the mean of the
    batches, at rates that are doubled until it diverges. Cosine similarity is blind to the length of embeddings, so
    that training does not diverge: no limit.

    Args:
        training: loss and optimiser.
        layer: the last layer.
        h1: features of the first views, (batches, n, m).
        h2: features of the second views.
        fastest: ρ_1.

    """
    nan = math.nan
    if not fastest > 0:
        return StableRates(nan, nan, nan)
    if training.loss == "simclr":
        return StableRates(nan, nan, _COSINE_DRIVE / fastest)
    if training.loss == "barlow_twins" and not training.settings["normalize"]:
        limits = stability_limits(training.momentum)
        worst = 4 * max(largest_gammas(h1, h2, training.settings["center"]))
        safe = min(limits.local, limits.safe) / max(worst, fastest)
        return StableRates(limits.even / fastest, safe, _SHARE * safe)
    limit = _simulated_limit(training, layer, fastest)
    return StableRates(limit, limit / 2, min(_DRIVE / fastest, _SHARE * limit if limit < math.inf else math.inf))


def largest_gammas(h1: Tensor, h2: Tensor, center: bool) -> list[float]:
    """Return the largest eigenvalue of Γ of each batch, by a hundred power iterations."""
    h1, h2 = (h.double() - (h.double().mean(1, keepdim=True) if center else 0.0) for h in (h1, h2))
    vector = h1.new_ones(len(h1), h1.shape[2], 1)
    value = h1.new_zeros(len(h1))
    for _ in range(100):
        vector = vector / vector.norm(dim=1, keepdim=True)
        moved = (h1.mT @ (h2 @ vector) + h2.mT @ (h1 @ vector)) / (2 * h1.shape[1])
        value, vector = (vector * moved).sum((1, 2)), moved
    return value.tolist()


def _simulated_limit(training: Training, layer: LastLayer, fastest: float) -> float:
    """Return the rate above which simulated training diverges, to 5 %; infinite where none does."""

    def stays(rate: float) -> bool:
        end = layer.simulate([rate] * _STEPS, training.momentum, measured_at=[_STEPS]).eigenvalues
        return bool(torch.isfinite(end).all())

    low, high = 0.1 / fastest, math.inf
    for _ in range(_DOUBLINGS):
        if not stays(2 * low):
            high = 2 * low
            break
        low *= 2
    if math.isinf(high):
        return math.inf
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if stays(middle) else (low, middle)
    return math.sqrt(low * high)
