r"""Stable and suggested learning rates of a last layer.

Legend
    γ_1     largest eigenvalue of the cross-correlation Γ of the features
    ρ_1     largest eigenvalue of the growth matrix H
    η       learning rate; x = ηρ_1 is the drive of the first mode
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from stepwise_lightning.forecasts.sgd import SGDSettings
from stepwise_lightning.precision import float64_pair, single_threaded
from stepwise_lightning.theory.last_layer import LastLayer
from stepwise_lightning.theory.stability import stability_limits

# Networks with feature learning diverge at lower rates than frozen features.
_FEATURE_LEARNING = 0.5
# Shares of the safe rate, and drives, at which the shipped configurations of small networks train well.
_SHARE, _DRIVE, _COSINE_DRIVE = 0.5, 0.4, 0.1
# Simulations: number of starts, which reach the limit at different phases, of batches, and of steps.
_STARTS, _BATCHES, _STEPS = 8, 16, 100
_STARTS_OF_FUNCTION = 2  # a step takes ten times as long
# Modes still grow by this factor in the last steps if training diverges without an overflow.
_LATE_STEPS, _LATE_GROWTH = 20, 1e3
_LEAST, _MOST, _FACTOR = 0.5, 100.0, 1.15  # smallest and largest x tried, and their ratio


class StableRates(NamedTuple):
    """Learning rates; NaN if unknown."""

    limit: float  #: above it at least half of all starts diverge with frozen features
    safe: float  #: half of the rate below which no start diverges on any batch: a margin for feature learning
    suggested: float


def stable_rates(
    sgd: SGDSettings,
    h1: Tensor,
    h2: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    components: int | None,
    fastest: float,
    scale_invariant: bool,
) -> StableRates:
    """Return the stable learning rates of a last layer, computed with frozen features.

    - Analytical Barlow Twins: closed form (:func:`stepwise_lightning.theory.stability.stability_limits`). Half of all
      small starts diverge at the limit for γ_1 of all pairs; none diverges below the limit for the largest γ_1 of a
      batch.
    - SimCLR and other scale-invariant losses: no limit, because the loss does not depend on the length of embeddings.
    - Other losses: simulated, one batch a step, from eight starts (two for a function), at rates that increase by 15 %
      until half of the starts diverge; no start diverges below the first rate at which one does.

    With feature learning, networks diverge from a third of the limit on. Hence ``safe`` is half of the rate at which no
    start diverges: small ResNets train at 0.8 times the safe rate and mostly diverge at 1.25 times the limit
    (``python -m reproduce stable_rates``); in between it depends on network and start.

    ``h1`` and ``h2`` are the features of both views, (batches, n, m) each; ``components`` is the number of components
    of a projection, see :class:`stepwise_lightning.theory.LastLayer`; ``fastest`` is ρ_1.
    ``scale_invariant`` is a property of the loss.
    """
    nan = math.nan
    if not fastest > 0:
        return StableRates(nan, nan, nan)
    if scale_invariant:
        return StableRates(nan, nan, _COSINE_DRIVE / fastest)
    if sgd.settings.get("normalize") is False:  # analytical Barlow Twins
        limits = stability_limits(sgd.momentum)
        worst = 4 * max(largest_gammas(h1, h2, sgd.settings["center"]))
        safe = _FEATURE_LEARNING * min(limits.local, limits.safe) / max(worst, fastest)
        return StableRates(limits.even / fastest, safe, _SHARE * safe)
    layers = []
    num_starts = _STARTS if isinstance(sgd.loss, str) else _STARTS_OF_FUNCTION
    for start in range(num_starts):
        x1, x2 = (h.roll(2 * start, 0)[:_BATCHES] for h in (h1, h2))
        scaled = weight * math.e ** (start / num_starts / 2)
        layers.append(LastLayer(sgd.loss, x1, x2, scaled, bias, components, in_turn=True, **sgd.settings))
    limit, stable = _simulated_limits(layers, sgd.momentum, fastest)
    safe = _FEATURE_LEARNING * stable
    return StableRates(limit, safe, min(_DRIVE / fastest, _SHARE * safe))


@single_threaded()
def largest_gammas(h1: Tensor, h2: Tensor, center: bool) -> list[float]:
    """Return the largest eigenvalue of Γ for each batch, by 100 power iterations."""
    h1, h2 = float64_pair(h1, h2, "views' features")
    if center:
        h1, h2 = (h - h.mean(1, keepdim=True) for h in (h1, h2))
    vector = h1.new_ones(len(h1), h1.shape[2], 1)
    value = h1.new_zeros(len(h1))
    for _ in range(100):
        vector = vector / vector.norm(dim=1, keepdim=True)
        moved = (h1.mT @ (h2 @ vector) + h2.mT @ (h1 @ vector)) / (2 * h1.shape[1])
        value, vector = (vector * moved).sum((1, 2)), moved
    return value.tolist()


def _simulated_limits(layers: list[LastLayer], momentum: float, fastest: float) -> tuple[float, float]:
    """Return the rates at which half of the layers, and the first layer, diverge; infinite if they do not."""

    def diverged(rate: float) -> int:
        late = [_STEPS - _LATE_STEPS, _STEPS]
        ends = [layer.simulate([rate] * _STEPS, momentum, measured_at=late).eigenvalues[:, 0] for layer in layers]
        return sum(not end.isfinite().all() or bool(end[1] > _LATE_GROWTH * end[0]) for end in ends)

    bound = _LEAST / fastest
    while 2 * diverged(bound) < len(layers):
        bound *= 2
        if bound > _MOST / fastest:
            return math.inf, math.inf
    # Start below the bound, because stable and diverging rates alternate near the limit.
    safe, rate = math.inf, bound / 4
    while True:
        count = diverged(rate)
        if count:
            safe = min(safe, rate / _FACTOR**0.5)
        if 2 * count >= len(layers) or rate > bound:
            return rate / _FACTOR**0.5, min(safe, rate)
        rate *= _FACTOR
