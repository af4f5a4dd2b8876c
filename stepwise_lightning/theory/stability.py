r"""Up to which learning rate analytical Barlow Twins trains from a small start, with momentum (beyond the paper).

Legend
    γ_1         largest eigenvalue of Γ; the features' largest cross-correlation
    η, β        learning rate, momentum
    x           4ηγ_1, what drives the first mode at each step
    r           what a small mode's weights are multiplied by at each step
    u           a mode's weights in units of what they end at, λ = u²
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from stepwise_lightning.precision import as_float64
from stepwise_lightning.theory.growth import check_momentum, heavy_ball_growth

__all__ = ["StabilityLimits", "diverging_fraction", "stability_limits"]


class StabilityLimits(NamedTuple):
    """Values of x = 4ηγ_1, of analytical Barlow Twins, that :func:`stability_limits` returns."""

    local: float
    safe: float
    even: float


# Small starts differ in when they arrive within a step: so many of these phases are followed.
_PHASES = 128
_SMALL, _ESCAPED = 1e-4, 1e3


def diverging_fraction(drive: Tensor, momentum: float) -> Tensor:
    r"""Return which share of small starts diverges under analytical Barlow Twins, by following one mode.

    In units of its final size a mode's weights follow p ← βp + x u (1 − u²), u ← u + p with x = 4ηγ. A small start is
    by the time that it matters u = u_0 r^φ, p = (1 − 1/r) u, where the phase φ in [0, 1) is whatever its size makes it:
    128 phases are followed. Near the limit their fates alternate on ever finer scales, so that a share is good to
    some hundredths.

    Args:
        drive: x > 0, (k,).
        momentum: β in [0, 1).

    Returns:
        (k,) float64, shares between 0 and 1.

    """
    root, _ = heavy_ball_growth(drive, momentum)
    x = as_float64(drive)[:, None]
    phases = torch.arange(_PHASES, dtype=torch.float64, device=x.device) / _PHASES
    u = _SMALL * root[:, None] ** phases
    p = u * (1 - 1 / root[:, None])
    growing = math.log(1 / _SMALL) / float(root.min().log())
    for _ in range(round(growing + 200 + 20 / (1 - momentum))):
        p = momentum * p + x * u * (1 - u.square())
        u = (u + p).clamp(-_ESCAPED, _ESCAPED)  # one that has escaped is not to overflow
    return (~(u.abs() < _ESCAPED)).double().mean(1)


def stability_limits(momentum: float) -> StabilityLimits:
    r"""Return up to which x = 4ηγ_1 analytical Barlow Twins trains from a small start.

    γ_1 is the largest eigenvalue of Γ: that of the batch in which it is largest. Three limits, and what
    happens above:

    - ``local`` = 1 + β: a mode that has been learned, λ = 1, does not stay so (curvature 8γ);
    - ``safe``: some small starts diverge (:func:`diverging_fraction`), because with momentum a mode arrives with speed;
    - ``even``: half of them do.

    =====  =====  =====  =====
    β      local  safe   even
    =====  =====  =====  =====
    0      1.00   2.00   2.00
    0.3    1.30   1.43   1.57
    0.5    1.50   1.20   1.37
    0.8    1.80   0.85   1.04
    0.9    1.90   0.72   0.89
    0.95   1.95   0.61   0.77
    0.99   1.99   0.46   0.60
    =====  =====  =====  =====

    Train below the lesser of the first two. Without momentum all starts diverge above 2, where
    (1 + x)³ = (27/4)(2 + x): the largest value that x u (1 − u²) + u takes is then its cycle of period 2. With momentum
    there is no sharp limit: between ``safe`` and about 2 it is the start that decides, which
    :class:`stepwise_lightning.theory.last_layer.LastLayer` simulates. Layers of ten dimensions on features of
    photographs diverge as one mode does: at β = 0.9, 0, 5, 18, 32 and 36 of 36 starts at x = 0.68, 0.79, 0.90, 1.08 and
    1.44. Other losses have other limits, which it simulates too.

    Args:
        momentum: β in [0, 1).

    Raises:
        ValueError: a momentum out of range.

    """
    check_momentum(momentum)
    grid = torch.arange(0.2, 2.2, 0.01, dtype=torch.float64)
    share = diverging_fraction(grid, momentum)
    safe, even = (float(grid[int((share > level).nonzero()[0]) - 1]) for level in (0.0, 0.5))
    return StabilityLimits(1 + momentum, safe, even)
