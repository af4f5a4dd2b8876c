r"""How fast small modes grow under gradient descent with momentum (beyond the paper).

Legend
    γ       eigenvalue of Γ; under gradient flow a small mode's weights grow as e^{4γt}
    η, m    learning rate, momentum; time t = η × number of steps
    x       what a growing mode's weights are multiplied by at each step
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepwise_lightning.errors import UserError


def with_momentum(gamma: Tensor, learning_rate: float, momentum: float) -> Tensor:
    r"""Return the γ′ under whose flow a small mode grows as fast as γ does in steps with momentum.

    Heavy-ball descent multiplies its weights by x at each step, the larger root of (x − 1)(1 − m/x) = 4ηγ, once the
    start has been forgotten, so that γ′ = ln x / 4η. Small steps: γ′ → γ/(1 − m), which is also taken for modes that
    decay. It is computed without the cancellation in x − 1, and is exactly zero where γ is.

    Args:
        gamma: γ, any shape, float64.
        learning_rate: η > 0.
        momentum: m in [0, 1).

    Raises:
        ValueError: a rate or momentum out of range.

    """
    if not learning_rate > 0 or not 0 <= momentum < 1:
        raise UserError(f"learning_rate must be above 0 and momentum in [0, 1), got {learning_rate} and {momentum}")
    drive, friction = 4 * learning_rate * gamma.clamp(min=0), 1 - momentum
    # x − 1 = (drive + √(friction² + excess) − friction) / 2, the difference of the last two written as a quotient.
    excess = 2 * (1 + momentum) * drive + drive.square()
    growth = (drive + excess / ((friction**2 + excess).sqrt() + friction)) / 2
    return torch.where(gamma > 0, growth.log1p() / (4 * learning_rate), gamma / friction)
