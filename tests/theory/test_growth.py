"""Growth with momentum against the iteration itself, and where nothing grows."""

import pytest
import torch

from stepwise_lightning.theory.growth import with_momentum


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
def test_a_mode_grows_as_in_steps_with_momentum(momentum):
    gamma, rate = torch.tensor([0.3, 3.0, 30.0], dtype=torch.float64), 1e-3
    weights, velocity = torch.ones_like(gamma), torch.zeros_like(gamma)
    logarithms = []
    for _ in range(4000):
        velocity = momentum * velocity + 4 * gamma * weights
        weights = weights + rate * velocity
        logarithms.append(weights.log())
        scale = weights.clamp(min=1)
        weights, velocity = weights / scale, velocity / scale  # or it would overflow
    per_step = torch.stack(logarithms[-500:]).mean(0)
    torch.testing.assert_close(4 * rate * with_momentum(gamma, rate, momentum), per_step, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_what_does_not_grow_stays_finite(momentum):
    gamma = torch.tensor([0.0, -0.0, 1e-300, 1e-18, -2.0], dtype=torch.float64)
    grown = with_momentum(gamma, 1e-3, momentum)
    torch.testing.assert_close(grown, gamma / (1 - momentum), rtol=1e-9, atol=0)
    with pytest.raises(ValueError, match=r"momentum in \[0, 1\), got 0.1 and 1"):
        with_momentum(gamma, 0.1, 1.0)
