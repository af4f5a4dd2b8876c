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

from stepwise_lightning.forecasts.sgd import SGDSettings
from stepwise_lightning.precision import single_threaded
from stepwise_lightning.theory.last_layer import LastLayer
from stepwise_lightning.theory.stability import stability_limits

__all__ = ["StableRates", "stable_rates"]

# Networks whose features move diverge at lower rates than features that stay.
_MOVING = 0.5
# Shares of what is safe, and drives, at which the shipped configurations of small networks train well.
_SHARE, _DRIVE, _COSINE_DRIVE = 0.5, 0.4, 0.1
# Simulated: starts that arrive at different moments within a step, on so many batches, for so many steps.
_STARTS, _BATCHES, _STEPS = 8, 16, 100
_LEAST, _MOST, _FACTOR = 0.5, 100.0, 1.15  # x between which rates are tried, and their ratio


class StableRates(NamedTuple):
    """Learning rates; NaN where none is known."""

    limit: float
    """Above it at least half of all starts diverge, on features that stay."""
    safe: float
    """Half of that below which none does, on any batch: what networks need whose features move."""
    suggested: float


def stable_rates(
    training: SGDSettings,
    h1: Tensor,
    h2: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    components: int | None,
    fastest: float,
) -> StableRates:
    """Return the learning rates of a last layer on features that stay.

    Analytical Barlow Twins has closed limits (:func:`stepwise_lightning.theory.stability.stability_limits`): the limit
    is where half of all small starts diverge, with the γ_1 of all pairs; below that with the γ_1 of the batch in which
    it is largest none does. For VICReg, and for Barlow Twins normalised, training is simulated through the batches in
    turn, from eight starts, at rates that rise by 15 % until half of them diverge; none does below the first that does.
    Features that move make networks diverge earlier, from a third of the limit on. So ``safe`` is half of where no
    start diverges: at 0.8 times that small ResNets train, and at 1.25 times the limit hardly one
    does (``python -m reproduce stable_rates``); in between it is network and start that decide.
    Cosine similarity is blind to the length of embeddings, so that training does not diverge: no limit.

    Args:
        training: loss and optimiser.
        h1: features of the first views, (batches, n, m).
        h2: features of the second views.
        weight: W, (d, m).
        bias: (d,) or None.
        components: of a projection, see :class:`stepwise_lightning.theory.LastLayer`.
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
        safe = _MOVING * min(limits.local, limits.safe) / max(worst, fastest)
        return StableRates(limits.even / fastest, safe, _SHARE * safe)
    layers = []
    for start in range(_STARTS):
        x1, x2 = (h.roll(2 * start, 0)[:_BATCHES] for h in (h1, h2))
        scaled = weight * math.e ** (start / _STARTS / 2)
        layers.append(LastLayer(training.loss, x1, x2, scaled, bias, components, in_turn=True, **training.settings))
    limit, unharmed = _simulated_limits(layers, training.momentum, fastest)
    safe = _MOVING * unharmed
    return StableRates(limit, safe, min(_DRIVE / fastest, _SHARE * safe))


@single_threaded()
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


def _simulated_limits(layers: list[LastLayer], momentum: float, fastest: float) -> tuple[float, float]:
    """Return the rates at which half of the layers and the first of them diverge; infinite where they do not."""

    def diverged(rate: float) -> int:
        ends = [layer.simulate([rate] * _STEPS, momentum, measured_at=[_STEPS]).eigenvalues for layer in layers]
        return sum(not torch.isfinite(end).all() for end in ends)

    bound = _LEAST / fastest
    while 2 * diverged(bound) < len(layers):
        bound *= 2
        if bound > _MOST / fastest:
            return math.inf, math.inf
    # Below it, because fates near the limit alternate.
    safe, rate = math.inf, bound / 4
    while True:
        count = diverged(rate)
        if count:
            safe = min(safe, rate / _FACTOR**0.5)
        if 2 * count >= len(layers) or rate > bound:
            return rate / _FACTOR**0.5, min(safe, rate)
        rate *= _FACTOR
