"""Forecasts compared with training of the last layer and of small networks."""

import math

import lightning as L
import pytest
import torch
from small_forecasts import ANALYTICAL, COARSE_RATES, DIM, PIXELS, batches, encoder, module, normal, pairs
from torch import nn

from stepwise_lightning import BarlowTwins, SimCLR, SpectralContrastive, SpectrumRecord, VICReg, forecast
from stepwise_lightning.forecasts.forecast import Forecast, correct_for_feature_learning
from stepwise_lightning.forecasts.learning_rates import StableRates
from stepwise_lightning.forecasts.sgd import SGDSettings, last_layer
from stepwise_lightning.forecasts.simulate import forecast_of_features
from stepwise_lightning.spectrum import detect_steps
from stepwise_lightning.theory import stability_limits


def test_forecast_does_not_change_the_module():
    model = module()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, training = torch.get_rng_state(), [part.training for part in model.modules()]
    forecast(model, batches(2), 50)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in model.modules()] == training and all(training)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_last_layer_is_searched_in_the_encoder():
    model = module()
    result = forecast(model, batches(2), 50)
    model.classifier = nn.Linear(DIM, 3)
    assert torch.equal(forecast(model, batches(2), 50).step_times, result.step_times)


@pytest.mark.parametrize("momentum", [pytest.param(0.0, marks=pytest.mark.slow), 0.9])
def test_step_times_match_training_of_the_last_layer(momentum):
    model, data, rate = module(momentum=momentum), batches(3), 0.004 if momentum else 0.02
    result = forecast(model, data, 400, learning_rate=rate)
    layer, network = last_layer(model), model.encoder[:-2]
    network[2].momentum = 0.0  # no update of running statistics
    with torch.no_grad():
        features = [network(torch.cat([batch[0], batch[1]]).split(64)[v]) for batch in data for v in (0, 1)]
    optimizer = torch.optim.SGD(layer.parameters(), rate, momentum)
    measured = []
    for _ in range(401):
        crosses = []
        for h1, h2 in zip(features[::2], features[1::2], strict=True):
            z1, z2 = (layer(h) - layer(h).mean(0) for h in (h1, h2))
            crosses.append((z1.T @ z2 + z2.T @ z1) / (2 * len(z1)))
        measured.append(torch.linalg.eigvalsh(torch.stack(crosses).mean(0).detach().double()).flip(0))
        optimizer.zero_grad()
        (torch.stack(crosses).mean(0) - torch.eye(DIM)).square().sum().backward()
        optimizer.step()
    expected = detect_steps(torch.arange(401.0), torch.stack(measured)).step_times
    learned = expected.isfinite()
    assert learned.sum() >= 3
    torch.testing.assert_close(result.step_times[learned], expected[learned], rtol=0.03, atol=0.5)


@COARSE_RATES
def test_only_the_first_mode_of_the_spectral_contrastive_loss_has_a_measured_error():
    result = forecast(module(SpectralContrastive), batches(8), 400)
    assert result.matrix == "cross_correlation"
    assert result.step_times.isfinite().sum() >= 2 and result.errors.isnan().tolist() == [False, True, True, True]
    assert 0 < result.rates.suggested < result.rates.safe < result.rates.limit
    assert "not measured" in str(result) and "not reliable" not in str(result)
    assert result.reliable_eigenvalues(torch.arange(5)).shape == (5, 1)


class OwnOptimizer(L.LightningModule):
    """A LightningModule of another package."""

    def __init__(self, schedule=False):
        super().__init__()
        self.network, self.schedule = encoder(), schedule

    def forward(self, x):
        return self.network(x)

    def configure_optimizers(self):
        sgd = torch.optim.SGD(self.parameters(), 0.02, 0.5, weight_decay=1e-3)
        return ([sgd], [torch.optim.lr_scheduler.ConstantLR(sgd)]) if self.schedule else sgd


def test_settings_of_plain_sgd_are_taken_from_configure_optimizers():
    result = forecast(OwnOptimizer(), batches(4), 100, loss="barlow_twins", settings=ANALYTICAL)
    given = forecast(
        encoder(), batches(4), 100, loss="barlow_twins", settings=ANALYTICAL, learning_rate=0.02, momentum=0.5,
        weight_decay=1e-3,
    )  # fmt: skip
    assert torch.equal(result.step_times, given.step_times) and (result.learning_rate, result.momentum) == (0.02, 0.5)
    with pytest.raises(ValueError, match="does not return one torch.optim.SGD without a schedule"):
        forecast(OwnOptimizer(schedule=True), batches(2), 10, loss="vicreg")


def test_forecast_follows_warm_up_and_cosine():
    model = module(warmup_steps=100, cosine=True)
    result, constant = (forecast(model, batches(8), 400, **rate) for rate in ({}, {"learning_rate": 0.02}))
    rates = [0.02 * min((k + 1) / 100, (1 + math.cos(math.pi * max(k - 100, 0) / 300)) / 2) for k in range(400)]
    same = forecast(model, batches(8), 400, learning_rate=rates)
    torch.testing.assert_close(result.step_times, same.step_times)
    assert 1.3 * constant.step_times[0] < result.step_times[0] < 200
    with pytest.raises(ValueError, match="one for each of the 400 steps to come"):
        forecast(model, batches(2), 400, learning_rate=[0.1, 0.1])


def test_forecast_of_another_module_with_explicit_settings():
    own = forecast(module(momentum=0.5), batches(4), 100)
    other = forecast(
        encoder(), batches(4), 100, loss="barlow_twins", settings=ANALYTICAL, learning_rate=0.02, momentum=0.5
    )
    assert torch.equal(own.step_times, other.step_times) and own.rates == other.rates
    for missing, message in (({}, "give loss="), ({"loss": "vicreg"}, "learning_rate must be given")):
        with pytest.raises(ValueError, match=message):
            forecast(encoder(), batches(2), 100, **missing)


def test_module_without_a_final_linear_layer_raises():
    model = nn.Sequential(encoder(), nn.Tanh())
    with pytest.raises(ValueError, match="does not end in its last linear layer"):
        forecast(model, batches(2), 100, loss="vicreg", learning_rate=0.1)
    with pytest.raises(ValueError, match="no linear layer"):
        forecast(nn.Conv2d(3, 3, 1), batches(2), 100, loss="vicreg", learning_rate=0.1)


def test_forecast_warns_of_unreliable_settings():
    result = " ".join(forecast(module(alpha=10.0), batches(1), 50).warnings)
    assert "64 pairs are few for 16 features" in result and "no separated steps" in result
    assert not forecast(module(), batches(4), 200).warnings
    limit = forecast(module(), batches(4), 200).rates.limit
    assert any("above the limit" in text for text in forecast(module(rate=1.1 * limit), batches(4), 200).warnings)
    assert any(
        "above the safe learning rate" in text for text in forecast(module(rate=0.7 * limit), batches(4), 200).warnings
    )
    starved = forecast(module(weight_decay=0.3), batches(4), 200).warnings
    assert any("weight decay 0.3 is not small compared" in text for text in starved)
    assert any("no small start" in text for text in forecast(module(SimCLR, alpha=1.0), batches(4), 50).warnings)


@pytest.mark.parametrize("momentum", [pytest.param(0.0, marks=pytest.mark.slow), 0.9])
def test_learning_rate_limits_of_barlow_twins_match_theory(momentum):
    result, data = forecast(module(momentum=momentum), batches(4), 50), batches(4)
    limits = stability_limits(momentum)
    assert result.rates.limit == pytest.approx(limits.even / float(result.growth_rates[0]))
    assert result.rates.suggested < result.rates.safe < result.rates.limit
    single = [forecast(module(momentum=momentum), [batch], 50) for batch in data]
    worst = max(float(one.growth_rates[0]) for one in single)
    assert result.rates.safe == pytest.approx(0.5 * min(limits.local, limits.safe) / worst, rel=1e-6)


@pytest.mark.slow
def test_last_layer_of_vicreg_diverges_above_the_limit():
    model, data = module(VICReg, momentum=0.9, eps=0.01), batches(4)
    result = forecast(model, data, 100)
    assert 0 < result.rates.suggested < result.rates.safe <= result.rates.limit < math.inf
    runs = [
        forecast(model, data, 300, learning_rate=rate) for rate in (1.4 * result.rates.safe, 3 * result.rates.limit)
    ]
    assert [bool(run.eigenvalues.isinf().any()) for run in runs] == [False, True]
    assert any("diverges" in text for text in runs[1].warnings)


@COARSE_RATES
def test_modes_without_a_typical_error_are_marked_not_reliable():
    for cls, count in ((BarlowTwins, DIM), (VICReg, 1)):
        result = forecast(module(cls, rate=0.005, **({"eps": 0.01} if cls is VICReg else {})), batches(4), 300)
        assert result.errors.isfinite().sum() == count
        assert result.reliable_eigenvalues(result.steps).shape == (len(result.steps), count)
        assert str(result).count("not reliable") == int(result.step_times[count:].isfinite().sum())
        assert "suggested" in str(result)


def test_forecast_continues_with_the_momentum_of_the_optimiser():
    """Compare a simulation from the start with one from half-way, with the velocity at that step."""
    h1, h2 = (h[None].double() for h in pairs(256))
    training = SGDSettings(
        "barlow_twins", SGDSettings.of(module(), 0, 300).settings, torch.full((300,), 0.002), 0.9, 0.0
    )
    weight = 1e-3 * normal(DIM, PIXELS).double()
    whole = forecast_of_features(training, h1, h2, weight, None)
    layer = nn.Linear(PIXELS, DIM, bias=False).double()
    layer.weight.data.copy_(weight)
    optimizer = torch.optim.SGD(layer.parameters(), 0.002, 0.9)
    half = int(whole.step_times[:2].mean())
    for _ in range(half):
        z1, z2 = (layer(h[0]) - layer(h[0]).mean(0) for h in (h1, h2))
        optimizer.zero_grad()
        ((z1.T @ z2 + z2.T @ z1) / 512 - torch.eye(DIM)).square().sum().backward()
        optimizer.step()
    rest = SGDSettings(*[training.loss, training.settings, training.rates[half:], 0.9, 0.0])
    buffer = [optimizer.state[layer.weight]["momentum_buffer"]]
    later = forecast_of_features(rest, h1, h2, layer.weight, None, half, buffer)
    assert later.next_mode[0] == 2 and later.num_learned == 1
    assert later.next_mode[1] == pytest.approx(float(whole.step_times[1]), abs=1.0)


def test_feature_learning_correction_grows_along_a_plateau():
    assert correct_for_feature_learning("barlow_twins", 100, 100, 200) == 200  # just learned
    assert correct_for_feature_learning("barlow_twins", 100, 150, 200) == pytest.approx(150 + 50 * (1 - 0.3 / 2))
    assert correct_for_feature_learning("barlow_twins", 100, 199, 200) == pytest.approx(199.7, abs=0.01)
    for loss, learned_at, step, expected in (
        ("vicreg", 100, 150, 200),
        ("simclr", 100, 150, 200),
        ("barlow_twins", 100, 150, math.inf),
        ("barlow_twins", 100, 150, 150),
    ):
        assert correct_for_feature_learning(loss, learned_at, step, expected) == expected


def test_plateau_correction_uses_the_step_of_the_last_learned_mode():
    steps = torch.tensor([0, 50, 100, 101, 102, 150])
    result = Forecast(
        "barlow_twins", "cross_correlation", 150, 1000, 0.1, 0.0, 64,
        torch.tensor([math.nan, 200.0, math.inf], dtype=torch.float64),
        torch.tensor([150, 1000]), torch.tensor([[1.0, 1e-4, 1e-6], [1.0, 1.0, 1e-5]], dtype=torch.float64), 0.1,
        torch.zeros(3), StableRates(1.0, 1.0, 1.0), (),
    )  # fmt: skip
    values = torch.full((6, 3), 1e-6, dtype=torch.float64)
    values[2:, 0] = 0.1 + 1e-12  # from step 100 on
    expected = correct_for_feature_learning("barlow_twins", 100, 150, 200)
    assert expected < 199
    known = result.with_plateau_correction(SpectrumRecord.of(steps, values, steps=steps))
    assert known.next_mode == (2, pytest.approx(expected, abs=1e-6)) and known.step_times[2] == math.inf
    unknown = SpectrumRecord.of(steps, values, matrix="covariance", steps=steps)
    learned_before = SpectrumRecord.of(steps[2:], values[2:], steps=steps[2:])
    for record in (unknown, learned_before, SpectrumRecord()):
        assert result.with_plateau_correction(record) is result


def test_step_of_a_mode_not_learned_before_max_steps_is_infinite():
    result = forecast(module(rate=1e-4), batches(4), 100)
    assert math.isinf(result.step_times[0]) and result.num_learned == 0
    assert result.next_mode == (1, math.inf)
