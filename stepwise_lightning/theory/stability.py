r"""Stability limits of the learning rate for analytical Barlow Twins from a small start, with momentum.

Legend
    Γ (m, m)    cross-correlation of the features; γ_1 its largest eigenvalue
    η, β        learning rate, momentum
    x           4ηγ_1, the drive of the first mode
    r           factor by which the weights of a small mode are multiplied at each step
    u           weights of a mode in units of their final value; its eigenvalue of C is λ = u²
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from stepwise_lightning.precision import TensorLike, as_float64
from stepwise_lightning.theory.growth import heavy_ball_growth


class StabilityLimits(NamedTuple):
    """Limits of x = 4ηγ_1 for analytical Barlow Twins; see :func:`stability_limits`."""

    local: float
    safe: float
    even: float


# Number of simulated phases: the fraction of a step at which a mode reaches its final size.
_PHASES = 128
_SMALL, _ESCAPED = 1e-4, 1e3


def diverging_fraction(drive: TensorLike, momentum: float) -> Tensor:
    r"""Return the fraction of small starts that diverge under analytical Barlow Twins, by simulating one mode.

    A mode follows p ← βp + x u (1 − u²), u ← u + p. Near the end of its linear growth a small start is
    u = u_0 r^φ, p = (1 − 1/r) u with a phase φ in [0, 1) that depends on its initial size; 128 phases are simulated.
    Near the limit convergence depends on the phase at ever finer scales, which limits the accuracy to a few hundredths.
    ``drive`` is x > 0, (k,), the result (k,), float64.
    """
    root, _ = heavy_ball_growth(drive, momentum)
    x = as_float64(drive)[:, None]
    phases = torch.arange(_PHASES, dtype=torch.float64, device=x.device) / _PHASES
    u = _SMALL * root[:, None] ** phases
    p = u * (1 - 1 / root[:, None])
    growing = math.log(1 / _SMALL) / float(root.min().log())
    for _ in range(round(growing + 200 + 20 / (1 - momentum))):
        p = momentum * p + x * u * (1 - u.square())
        u = (u + p).clamp(-_ESCAPED, _ESCAPED)  # avoid overflow
    return (~(u.abs() < _ESCAPED)).double().mean(1)


def stability_limits(momentum: float) -> StabilityLimits:
    r"""Return the largest x = 4ηγ_1 at which analytical Barlow Twins trains from a small start.

    For batches, γ_1 is the largest over batches. Above

    - ``local`` = 1 + β, the fixed point λ = 1 of a learned mode is unstable (curvature 8γ);
    - ``safe``, some small starts diverge (:func:`diverging_fraction`), because a mode overshoots under momentum;
    - ``even``, half of the small starts diverge.

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

    Train below the smaller of the first two. Without momentum all starts diverge above 2, where
    (1 + x)³ = (27/4)(2 + x): the maximum of u + x u (1 − u²) lies on its cycle of period 2. With momentum the limit is
    not sharp: between ``safe`` and about 2 convergence depends on the start. To simulate a given start, or another
    loss, use :class:`stepwise_lightning.theory.last_layer.LastLayer`.

    Args:
        momentum: β in [0, 1).

    Raises:
        ValueError: a momentum out of range.

    """
    grid = torch.arange(0.2, 2.2, 0.01, dtype=torch.float64)
    fraction = diverging_fraction(grid, momentum)
    safe, even = (float(grid[int((fraction > level).nonzero()[0]) - 1]) for level in (0.0, 0.5))
    return StabilityLimits(1 + momentum, safe, even)
