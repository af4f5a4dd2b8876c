"""Growth and stability under momentum, against direct iteration."""

import pytest
import torch

from stepwise_lightning.theory import LastLayer, growth_matrix, heavy_ball_growth, stability_limits
from stepwise_lightning.theory.stability import diverging_fraction


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
def test_heavy_ball_growth_matches_iteration(momentum):
    drive = torch.tensor([1e-4, 0.037, 0.5, 3.0], dtype=torch.float64)
    root, amplitude = heavy_ball_growth(drive, momentum)
    weights, velocity = torch.ones_like(drive), torch.zeros_like(drive)
    for step in range(1, 40):
        velocity = momentum * velocity + drive * weights
        weights = weights + velocity
        expected = amplitude * root**step + (1 - amplitude) * (momentum / root) ** step
        torch.testing.assert_close(weights, expected, rtol=1e-12, atol=0)


def test_zero_drive_gives_no_growth_and_negative_drive_raises():
    root, amplitude = heavy_ball_growth(torch.tensor([0.0], dtype=torch.float64), 0.9)
    assert float(root) == 1 and float(amplitude) == pytest.approx(1)
    with pytest.raises(ValueError, match="drive must be ≥ 0"):
        heavy_ball_growth(torch.tensor([0.1, -0.1]), 0.9)
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\), got 1"):
        heavy_ball_growth(torch.tensor([0.1]), 1.0)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def features(num_pairs=512, scales=(2.0, 1.4, 1.0, 0.5, 0.3, 0.2)):
    """Return two views with well-separated modes in their shared content and little noise."""
    content = normal(num_pairs, len(scales)) * torch.tensor(scales, dtype=torch.float64)
    return [content + 0.1 * normal(*content.shape, seed=k) for k in (1, 2)]


SETTINGS = {
    "barlow_twins": ({"normalize": False, "center": True, "off_diagonal_weight": 1.0}, 0.003),
    "vicreg": ({"eps": 0.1}, 0.0005),
    "simclr": ({"temperature": 0.2}, 0.002),
}


@pytest.mark.parametrize("loss", SETTINGS)
def test_first_mode_grows_at_predicted_rate_from_small_weights(loss):
    settings, rate = SETTINGS[loss]
    (h1, h2), bias = features(64), normal(4, seed=5)
    growth = growth_matrix(loss, h1, h2, 4, bias_norm=float(bias.norm()), **settings)
    root, _ = heavy_ball_growth(rate * torch.linalg.eigvalsh(growth)[-1], 0.9)
    layer = LastLayer(loss, h1, h2, 1e-7 * normal(4, 6, seed=4), bias, **settings)
    largest = layer.simulate([rate] * 300, 0.9).eigenvalues[:, 0]
    end = int((largest > 1e-6).nonzero()[0])
    assert float((largest[end] / largest[end - 1]).sqrt() - 1) == pytest.approx(float(root - 1), rel=0.01)


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
def test_stability_limits_match_documented_table(momentum, expected):
    assert stability_limits(momentum) == pytest.approx(expected, abs=0.006)


def final_eigenvalues(drive, momentum, starts):
    """Simulate one mode on a feature of unit variance and return its last eigenvalue for each start."""
    feature = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    eigenvalues = []
    for start in starts:
        layer = LastLayer("barlow_twins", feature, feature, torch.tensor([[start]]), normalize=False, center=True)
        eigenvalues.append(float(layer.simulate([drive / 4] * 400, momentum, measured_at=[400]).eigenvalues))
    return torch.tensor(eigenvalues)


def test_all_starts_converge_below_safe_limit_and_diverge_far_above():
    starts = torch.logspace(-6, -4, 7).tolist()
    safe = stability_limits(0.9).safe
    torch.testing.assert_close(final_eigenvalues(0.97 * safe, 0.9, starts), torch.ones(7), rtol=1e-6, atol=0)
    assert final_eigenvalues(3 * safe, 0.9, starts).isinf().all()


def test_divergence_between_limits_depends_on_start():
    drive = torch.tensor([0.9], dtype=torch.float64)
    root, _ = heavy_ball_growth(drive, 0.9)
    starts = [1e-5 * float(root) ** (k / 24) for k in range(24)]  # every phase of a step
    diverged = final_eigenvalues(0.9, 0.9, starts).isinf().double().mean()
    assert 0.3 < float(diverged) < 0.9
    assert float(diverging_fraction(drive, 0.9)) == pytest.approx(float(diverged), abs=0.15)
