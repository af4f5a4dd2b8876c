"""Growth matrices against Hessian–vector products of the losses, by autograd in float64."""

from itertools import combinations

import pytest
import torch

from stepwise_lightning import barlow_twins_loss, simclr_loss, spectral_contrastive_loss, vicreg_loss
from stepwise_lightning.theory import FeatureMoments, growth_matrix

NUM_PAIRS, NUM_FEATURES, DIM = 24, 9, 5
LOSSES = {
    "barlow_twins": barlow_twins_loss,
    "vicreg": vicreg_loss,
    "simclr": simclr_loss,
    "spectral_contrastive": spectral_contrastive_loss,
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def features(num_pairs=NUM_PAIRS, seed=0):
    """Return two views with shared content, noise and different means."""
    content = normal(num_pairs, NUM_FEATURES, seed=seed)
    views = [content + 0.7 * normal(num_pairs, NUM_FEATURES, seed=seed + k) + 0.5 * k for k in (1, 2)]
    return views[0], views[1]


def hessian_product(loss, bias, direction):
    """Return the loss's Hessian in the weights, at zero weights, times ``direction``."""
    h1, h2 = features()
    zero = torch.zeros_like(direction)
    return torch.autograd.functional.hvp(lambda w: loss(h1 @ w.T + bias, h2 @ w.T + bias), zero, direction)[1]


def error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        ("barlow_twins", {"normalize": False, "center": True, "off_diagonal_weight": 1.0}),
        ("barlow_twins", {"normalize": False, "center": True, "off_diagonal_weight": 0.3}),
        ("barlow_twins", {"normalize": False, "center": False, "eps": 0.0}),
        ("barlow_twins", {}),
        ("barlow_twins", {"eps": 1e-3, "off_diagonal_weight": 1.0}),
        ("vicreg", {}),
        ("vicreg", {"eps": 1e-2, "variance_weight": 7.0, "invariance_weight": 3.0, "covariance_weight": 9.0}),
        ("spectral_contrastive", {}),
        ("simclr", {}),
        ("simclr", {"temperature": 0.1}),
    ],
)
def test_growth_matrix_matches_hessian_of_loss(loss, settings):
    direction, bias = normal(DIM, NUM_FEATURES, seed=8), torch.zeros(DIM, dtype=torch.float64)
    growth = growth_matrix(loss, *features(), DIM, **settings)
    expected = -direction @ growth
    if loss == "simclr":
        bias = normal(DIM, seed=9)
        growth = growth_matrix(loss, *features(), DIM, bias_norm=float(bias.norm()), **settings)
        expected = -(direction - bias.outer(bias @ direction) / bias.square().sum()) @ growth
    product = hessian_product(lambda z1, z2: LOSSES[loss](z1, z2, **settings), bias, direction)
    assert error(product, expected) < 1e-10


def test_simclr_gradient_without_bias_diverges_at_small_weights():
    h1, h2 = features()
    weights = normal(DIM, NUM_FEATURES, seed=8)
    gradients = [
        torch.autograd.functional.jacobian(lambda w: simclr_loss(h1 @ w.T, h2 @ w.T), scale * weights)
        for scale in (1.0, 1e-3)
    ]
    # a loss of second order in small weights would have a gradient proportional to them
    torch.testing.assert_close(gradients[1], 1e3 * gradients[0], rtol=1e-9, atol=1e-9)


def test_simclr_bias_gradient_is_second_order_in_weights():
    h1, h2 = features()
    weights, bias = normal(DIM, NUM_FEATURES, seed=8), normal(DIM, seed=9)
    gradients = [
        torch.autograd.functional.jacobian(
            lambda b, scale=scale: simclr_loss(h1 @ (scale * weights).T + b, h2 @ (scale * weights).T + b), bias
        ).norm()
        for scale in (1e-3, 1e-4)
    ]
    assert float(gradients[0] / gradients[1]) == pytest.approx(100, rel=0.02)


@pytest.mark.parametrize(
    ("loss", "settings", "share"),
    [
        ("barlow_twins", {"normalize": False, "center": True}, lambda n: 1 - 1 / n),
        ("vicreg", {"eps": 0.1}, lambda n: 1.0),
        ("simclr", {}, lambda n: 1 - 1 / (2 * n - 1)),
    ],
    ids=["barlow_twins", "vicreg", "simclr"],
)
def test_growth_matrix_of_batches_has_documented_expectation(loss, settings, share):
    """The mean over all batches of 3 of 8 pairs is the expectation over random batches."""
    h1, h2 = features(8)
    drawn = torch.tensor(list(combinations(range(8), 3)))
    in_batches = growth_matrix(loss, h1[drawn], h2[drawn], DIM, **settings)
    one_by_one = torch.stack([growth_matrix(loss, h1[i], h2[i], DIM, **settings) for i in drawn]).mean(0)
    torch.testing.assert_close(in_batches, one_by_one, rtol=1e-10, atol=1e-10)
    assert error(in_batches / share(3), growth_matrix(loss, h1, h2, DIM, **settings) / share(8)) < 1e-12


def test_feature_moments_match_definitions():
    h1, h2 = features()
    moments = FeatureMoments.of(h1.float(), h2)
    h1 = h1.float().double()
    both, c1, c2 = torch.cat([h1, h2]), h1 - h1.mean(0), h2 - h2.mean(0)
    pairs = range(NUM_PAIRS)
    expected = {
        "cross": sum(c1[i].outer(c2[i]) for i in pairs) / NUM_PAIRS,
        "uncentered_cross": sum(h1[i].outer(h2[i]) for i in pairs) / NUM_PAIRS,
        "covariance1": torch.cov(h1.T),
        "covariance2": torch.cov(h2.T),
        "covariance": torch.cov(both.T),
        "pooled": torch.cov(both.T, correction=0),
        "difference": sum((h1[i] - h2[i]).outer(h1[i] - h2[i]) for i in pairs) / NUM_PAIRS,
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(moments, name), value, rtol=1e-12, atol=1e-12, msg=name)


def test_feature_moments_are_accurate_for_large_means():
    h1, h2 = features()
    shifted = FeatureMoments.of(h1 + 2.0**20, h2 + 2.0**20)
    torch.testing.assert_close(shifted.difference, FeatureMoments.of(h1, h2).difference, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(shifted.covariance, FeatureMoments.of(h1, h2).covariance, rtol=1e-8, atol=1e-8)


def test_invalid_arguments_raise():
    h1, h2 = features()
    with pytest.raises(
        ValueError, match="loss must be one of 'barlow_twins', 'vicreg', 'simclr', 'spectral_contrastive', got 'byol'"
    ):
        growth_matrix("byol", h1, h2, DIM)
    with pytest.raises(ValueError, match="vicreg has no setting temperature; it has invariance_weight"):
        growth_matrix("vicreg", h1, h2, DIM, temperature=0.1)
    with pytest.raises(ValueError, match="eps must be above 0 for a growth matrix, got 0"):
        growth_matrix("vicreg", h1, h2, DIM, eps=0.0)
    with pytest.raises(ValueError, match="dim must be at least 1 and bias_norm above 0, got 5 and 0"):
        growth_matrix("simclr", h1, h2, DIM, bias_norm=0.0)
    with pytest.raises(ValueError, match=r"must have the same shape.* got \(24, 9\) and \(23, 9\)"):
        growth_matrix("simclr", h1, h2[1:], DIM)
    with pytest.raises(ValueError, match="a covariance needs at least 2 pairs per batch, got 1"):
        growth_matrix("simclr", h1[:1], h2[:1], DIM)
    with pytest.raises(ValueError, match="NaN or infinite"):
        growth_matrix("simclr", h1 / 0, h2, DIM)
