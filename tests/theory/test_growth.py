"""Growth with momentum, and up to which rate it is stable, against the iteration itself; where nothing grows."""

import math

import pytest
import torch

from stepwise_lightning.theory import (
    FeatureMoments,
    LastLayer,
    expected_steps,
    growth_matrix,
    heavy_ball_growth,
    stability_limits,
)
from stepwise_lightning.theory.stability import diverging_fraction


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
def test_root_and_amplitude_give_every_step_of_a_growing_mode(momentum):
    drive = torch.tensor([1e-4, 0.037, 0.5, 3.0], dtype=torch.float64)
    root, amplitude = heavy_ball_growth(drive, momentum)
    weights, velocity = torch.ones_like(drive), torch.zeros_like(drive)
    for step in range(1, 40):
        velocity = momentum * velocity + drive * weights
        weights = weights + velocity
        expected = amplitude * root**step + (1 - amplitude) * (momentum / root) ** step
        torch.testing.assert_close(weights, expected, rtol=1e-12, atol=0)


def test_only_modes_that_grow_have_a_root_above_one():
    root, amplitude = heavy_ball_growth(torch.tensor([0.0], dtype=torch.float64), 0.9)
    assert float(root) == 1 and float(amplitude) == pytest.approx(1)
    with pytest.raises(ValueError, match="drive must be ≥ 0"):
        heavy_ball_growth(torch.tensor([0.1, -0.1]), 0.9)
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\), got 1"):
        heavy_ball_growth(torch.tensor([0.1]), 1.0)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def features(num_pairs=512, scales=(2.0, 1.4, 1.0, 0.5, 0.3, 0.2)):
    """Two views whose shared content has well separated modes, and little noise."""
    content = normal(num_pairs, len(scales)) * torch.tensor(scales, dtype=torch.float64)
    return [content + 0.1 * normal(*content.shape, seed=k) for k in (1, 2)]


def step_of_reaching(trajectory, mode, level):
    """Return the step at which a mode's eigenvalue reaches a level, by logarithmic interpolation between two steps."""
    logarithms = trajectory.eigenvalues[:, mode].log()
    after = int((logarithms > math.log(level)).nonzero()[0])
    share = (math.log(level) - logarithms[after - 1]) / (logarithms[after] - logarithms[after - 1])
    return after - 1 + float(share)


SETTINGS = {
    "barlow_twins": ({"normalize": False, "center": True, "off_diagonal_weight": 1.0}, 0.003),
    "vicreg": ({"eps": 0.1}, 0.0005),
    "simclr": ({"temperature": 0.2}, 0.002),
}


@pytest.mark.parametrize("loss", SETTINGS)
def test_the_first_mode_comes_when_expected(loss):
    settings, rate = SETTINGS[loss]
    (h1, h2), bias = features(64), normal(4, seed=5)
    weights = 1e-7 * normal(4, 6, seed=4)
    growth = growth_matrix(loss, h1, h2, 4, bias_norm=float(bias.norm()), **settings)
    moments = FeatureMoments.of(h1, h2)
    measured = {"barlow_twins": moments.gamma(), "vicreg": moments.pooled, "simclr": moments.pooled / bias.dot(bias)}
    growing = weights - bias.outer(bias @ weights) / bias.dot(bias) if loss == "simclr" else weights
    expected = expected_steps(growth, measured[loss], growing, rate, 0.9, 1e-4)
    simulated = LastLayer(loss, h1, h2, weights, bias, **settings).simulate([rate] * 300, 0.9)
    assert float(expected[0]) == pytest.approx(step_of_reaching(simulated, 0, 1e-4), abs=0.1)
    assert expected[0] < expected[1]
    if loss == "simclr":
        assert expected[-1] == math.inf  # one direction is the bias's


def test_all_modes_of_barlow_twins_come_when_expected():
    settings, rate = SETTINGS["barlow_twins"]
    h1, h2 = features()
    weights = 1e-7 * normal(4, 6, seed=4)
    growth = growth_matrix("barlow_twins", h1, h2, 4, **settings)
    expected = expected_steps(growth, FeatureMoments.of(h1, h2).gamma(), weights, rate, 0.9, 0.1)
    simulated = LastLayer("barlow_twins", h1, h2, weights, **settings).simulate([rate] * 1500, 0.9)
    measured = [step_of_reaching(simulated, mode, 0.1) for mode in range(4)]
    torch.testing.assert_close(expected, torch.tensor(measured, dtype=torch.float64), rtol=0.02, atol=0)


def test_modes_that_have_begun_and_modes_that_never_grow():
    growth, measured = torch.diag(torch.tensor([2.0, 1.0, -1.0])), torch.eye(3)
    steps = expected_steps(growth, measured, torch.diag(torch.tensor([1.0, 0.1, 0.1])), 0.01, 0.0, 0.5)
    assert steps.tolist() == [0.0, pytest.approx(math.log(50) / (2 * math.log(1.01))), math.inf]
    more_rows = torch.cat([torch.eye(3), torch.ones(1, 3)])
    assert expected_steps(growth, measured, more_rows, 0.01, 0.0, 9.0)[2:].tolist() == [math.inf, math.inf]
    with pytest.raises(ValueError, match=r"growth and measured must be \(m, m\) and weights0 \(d, m\)"):
        expected_steps(growth, torch.eye(2), torch.eye(3), 0.01, 0.0, 0.5)
    with pytest.raises(ValueError, match="threshold must be above 0, got 0.01 and 0"):
        expected_steps(growth, measured, torch.eye(3), 0.01, 0.0, 0.0)


@pytest.mark.parametrize(
    ("momentum", "expected"),
    [
        (0.0, (1.00, 2.00, 2.00)),
        (0.3, (1.30, 1.43, 1.57)),
        (0.5, (1.50, 1.20, 1.37)),
        (0.8, (1.80, 0.85, 1.04)),
        (0.9, (1.90, 0.72, 0.89)),
        (0.95, (1.95, 0.61, 0.77)),
        (0.99, (1.99, 0.46, 0.60)),
    ],
)
def test_stability_limits_are_those_of_the_table(momentum, expected):
    assert stability_limits(momentum) == pytest.approx(expected, abs=0.006)


def simulated_ends(drive, momentum, starts):
    """Return the last eigenvalue of one mode on a feature of unit variance, for each start, by the loss itself."""
    feature = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    ends = []
    for start in starts:
        layer = LastLayer("barlow_twins", feature, feature, torch.tensor([[start]]), normalize=False, center=True)
        ends.append(float(layer.simulate([drive / 4] * 400, momentum, measured_at=[400]).eigenvalues))
    return torch.tensor(ends)


def test_below_the_safe_limit_every_start_is_stable_and_far_above_none():
    starts = torch.logspace(-6, -4, 7).tolist()
    safe = stability_limits(0.9).safe
    torch.testing.assert_close(simulated_ends(0.97 * safe, 0.9, starts), torch.ones(7), rtol=1e-6, atol=0)
    assert simulated_ends(3 * safe, 0.9, starts).isinf().all()


def test_in_between_it_is_the_start_that_decides():
    drive = torch.tensor([0.9], dtype=torch.float64)
    root, _ = heavy_ball_growth(drive, 0.9)
    starts = [1e-5 * float(root) ** (k / 24) for k in range(24)]  # every phase of a step
    diverged = simulated_ends(0.9, 0.9, starts).isinf().double().mean()
    assert 0.3 < float(diverged) < 0.9
    assert float(diverging_fraction(drive, 0.9)) == pytest.approx(float(diverged), abs=0.15)
