"""Forecasts of losses that are functions or modules."""

import math
from functools import partial

import pytest
import torch
from small_forecasts import COARSE_RATES, DIM, PIXELS, WithAnyLoss, batches, encoder, module, normal, pairs
from torch import nn

from reproduce.losses import dcl_loss, lejepa_loss
from stepwise_lightning import SpectralContrastive, forecast, spectral_contrastive_loss, vicreg_loss
from stepwise_lightning.forecasts.sgd import SGDSettings
from stepwise_lightning.forecasts.simulate import forecast_of_features
from stepwise_lightning.modules import JointEmbedding
from stepwise_lightning.theory import heavy_ball_growth


def with_bias(alpha=1e-4):
    """Return an encoder with a last bias of norm one."""
    network = encoder(alpha)
    with torch.no_grad():
        network[-1].bias.copy_(normal(DIM) / normal(DIM).norm())
    return network


def test_forecast_of_a_function_agrees_with_the_named_loss():
    """All batches at once or one a step: up to the difference between the batches."""
    models = [module(cls) for cls in (SpectralContrastive, WithAnyLoss)]
    models[1].driven_matrix = "cross_correlation"
    for model in models:
        model.encoder[-1].bias = None
    named, function = (forecast(model, batches(4), 200) for model in models)
    assert function.matrix == named.matrix and str(function).startswith("WithAnyLoss, ")
    torch.testing.assert_close(function.growth_rates, named.growth_rates, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(function.step_times[:2], named.step_times[:2], rtol=0.05, atol=0)
    assert function.errors.isnan().all() and "not measured" in str(function)
    assert function.rates.limit == pytest.approx(named.rates.limit, rel=0.3)


@pytest.mark.parametrize("momentum", [pytest.param(0.0, marks=pytest.mark.slow), 0.9])
def test_scale_invariant_function_has_the_growth_rates_of_its_signature(momentum):
    network = with_bias()
    options = {"loss": dcl_loss, "learning_rate": 0.02, "momentum": momentum}
    result = forecast(network, batches(8), 600, **options)
    assert result.matrix == "covariance" and math.isnan(result.rates.limit)
    assert result.rates.suggested == pytest.approx(0.1 / float(result.growth_rates[0]))
    assert "no limit: the loss does not depend on the length" in str(result) and not result.warnings
    root, _ = heavy_ball_growth(0.02 * result.growth_rates[:1], momentum)
    values = result.at(torch.tensor([20, 40]))[:, 0]  # of the exponential growth
    expected = 20 * 2 * float(root.log())
    assert float((values[1] / values[0]).log()) == pytest.approx(expected, rel=0.1)
    nn.init.zeros_(network[-1].bias)
    no_start = forecast(network, batches(2), 50, **options)
    assert no_start.growth_rates.isnan().all() and no_start.rates.suggested != no_start.rates.suggested
    assert "dcl_loss has no small start, because the bias" in no_start.warnings[-1]


@COARSE_RATES
def test_anisotropic_function_has_the_rates_of_the_whole_operator():
    loss = partial(lejepa_loss, sigreg_weight=0.3, num_directions=8)
    result = forecast(encoder(), batches(2), 200, loss=loss, learning_rate=0.01)
    assert result.growth_rates[0] > 0 and result.growth_rates.diff().max() <= 0
    assert result.step_times[0] < 200 and str(result).startswith("lejepa_loss, ")
    assert 0 < result.rates.suggested < result.rates.limit


def test_function_that_is_not_centred_or_has_no_growth_rates_is_reported():
    h1, h2 = (h[None] for h in pairs(64))

    def warnings(loss, matrix=None):
        sgd = SGDSettings(loss, {}, torch.full((20,), 0.01), 0.0, 0.0, matrix)
        return forecast_of_features(sgd, h1, h2, 1e-3 * normal(DIM, PIXELS), None, with_rates=False).warnings

    (warning,) = (text for text in warnings(spectral_contrastive_loss) if "centred" in text)
    assert "set driven_matrix to 'cross_correlation'" in warning
    assert not any("centred" in text for text in warnings(spectral_contrastive_loss, "cross_correlation"))
    assert not any("centred" in text for text in warnings(vicreg_loss))
    kink = warnings(lambda z1, z2: z1.var(0).sqrt().sum() + (z1 - z2).square().sum())
    assert any("growth rates and stable learning rates are unknown: the loss is not differ" in text for text in kink)


@COARSE_RATES
def test_random_or_changing_losses_are_refused_or_restored():
    with pytest.raises(ValueError, match="the loss is random"):
        forecast(encoder(), batches(1), 10, learning_rate=0.1, loss=lambda z1, z2: (z1 * torch.rand(DIM) * z2).sum())
    model = module(WithAnyLoss)
    model.register_buffer("calls", torch.zeros(()))

    def counted(z1, z2):
        model.calls += 1
        return spectral_contrastive_loss(z1, z2)

    model.function = counted
    forecast(model, batches(1), 10)
    assert model.calls == 0


class Predicted(nn.Module):
    """Spectral contrastive loss of predicted embeddings, with a counter of calls."""

    def __init__(self):
        super().__init__()
        self.predictor = nn.Linear(DIM, DIM, bias=False)
        nn.init.eye_(self.predictor.weight)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, z1, z2):
        self.calls += 1
        return spectral_contrastive_loss(self.predictor(z1), z2)


def test_loss_with_parameters_is_simulated_with_constant_parameters():
    loss = Predicted()
    model = JointEmbedding(encoder(), 0.02, loss=loss)
    h1, h2 = (h[None] for h in pairs(64))
    weight = 1e-3 * normal(DIM, PIXELS)
    settings = [
        SGDSettings.of(model, 0, 60),
        SGDSettings.of(encoder(), 0, 60, loss=loss, learning_rate=0.02),
        SGDSettings.of(encoder(), 0, 60, loss=spectral_contrastive_loss, learning_rate=0.02),
    ]
    *results, expected = (forecast_of_features(sgd, h1, h2, weight, None, with_rates=False) for sgd in settings)
    for result in results:
        torch.testing.assert_close(result.eigenvalues, expected.eigenvalues)
        assert str(result).startswith("Predicted, learning rate 0.02")
    assert loss.calls == 0 and loss.predictor.weight.dtype == torch.float32 and model.loss_function is loss
