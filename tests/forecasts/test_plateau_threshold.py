"""Threshold of learned modes in forecasts of runs that end before the first mode, and of losses without one."""

import math

import pytest
import torch

from stepwise_lightning import spectral_contrastive_loss
from stepwise_lightning.forecasts import simulate
from stepwise_lightning.forecasts.sgd import SGDSettings
from stepwise_lightning.forecasts.simulate import forecast_of_features

DIM, PIXELS = 3, 6


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noisy_pairs(noise):
    """Return features of two views, (2, 64, m) each, with one shared direction of variance 1, and noise."""
    shared = normal(2, 64, 1, seed=3) * torch.eye(PIXELS, dtype=torch.float64)[0]
    return [shared + noise * normal(2, 64, PIXELS, seed=k) for k in (1, 2)]


def result_of(loss, rate, steps, noise, bias=None, **settings):
    loss_settings = {"settings": settings, "driven_matrix": None if isinstance(loss, str) else "covariance"}
    sgd = SGDSettings(loss, rates=torch.full((steps,), rate), momentum=0.0, weight_decay=0.0, **loss_settings)
    weight = 1e-4 * normal(DIM, PIXELS, seed=5)
    return forecast_of_features(sgd, *noisy_pairs(noise), weight, bias, with_rates=False)


def test_noise_in_the_covariance_is_no_plateau():
    noise = 3.0 * (torch.arange(PIXELS) > 0)  # hardly grows
    result = result_of(spectral_contrastive_loss, 0.01, 6, noise)
    assert result.threshold == pytest.approx(0.1, rel=0.1) and result.eigenvalues.max() < 1e-5
    assert result.num_learned == 0 and result.next_mode == (1, math.inf)


def test_plateau_is_found_if_other_modes_decay_much_faster_than_the_first_grows(monkeypatch):
    def stiff(z1, z2):
        return spectral_contrastive_loss(z1, z2) + 12 * (z1 - z2).square().sum(1).mean()

    monkeypatch.setattr(simulate, "_PLATEAU_STEPS", 200)
    noise = 2.0 * (torch.arange(PIXELS) > 0)  # decays at a rate of about 200
    result = result_of(stiff, 0.001, 20, noise)
    assert float(result.growth_rates[0]) < 5 and result.step_times.isinf().all()
    assert result.threshold == pytest.approx(0.1, rel=0.2)


def test_no_mode_is_learned_if_none_grows():
    result = result_of(lambda z1, z2: (z1 - z2).square().sum(1).mean(), 0.01, 50, noise=0.5)
    assert (result.growth_rates <= 0).all()
    assert result.num_learned == 0 and result.step_times.isinf().all()


def test_bias_is_a_feature_of_losses_that_are_not_centred():
    bias = 1e-3 * torch.ones(DIM, dtype=torch.float64)
    by_name, function = (
        result_of(loss, 0.01, 20, noise=0.1, bias=bias) for loss in ("spectral_contrastive", spectral_contrastive_loss)
    )
    torch.testing.assert_close(by_name.growth_rates, function.growth_rates, rtol=1e-12, atol=1e-12)
    assert (by_name.growth_rates > 1).sum() == 2  # of the shared direction and of the mean
