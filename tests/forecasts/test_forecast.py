"""Forecasts compared with training of the last layer and of small networks."""

import logging
import math
from functools import partial

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from reproduce.losses import dcl_loss, lejepa_loss
from stepwise_lightning import (
    AcceleratedBarlowTwins,
    BarlowTwins,
    ForecastLogger,
    SimCLR,
    SpectralContrastive,
    SpectrumLogger,
    SpectrumRecord,
    TwoViewDataModule,
    VICReg,
    forecast,
    spectral_contrastive_loss,
    vicreg_loss,
)
from stepwise_lightning.callbacks.progress import LineProgress
from stepwise_lightning.forecasts.forecast import Forecast, correct_for_feature_learning
from stepwise_lightning.forecasts.learning_rates import StableRates
from stepwise_lightning.forecasts.sgd import SGDSettings, last_layer
from stepwise_lightning.forecasts.simulate import forecast_of_features, unseen_batches
from stepwise_lightning.modules import JointEmbedding
from stepwise_lightning.plots import run_figure
from stepwise_lightning.spectrum import detect_steps
from stepwise_lightning.theory import heavy_ball_growth, stability_limits

ANALYTICAL = {"off_diagonal_weight": 1.0, "normalize": False, "center": True}
PIXELS, DIM = 20, 4


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pairs(number, seed=0):
    """Return two views with a decaying spectrum, (number, PIXELS) each."""
    content = normal(number, PIXELS, seed=seed) * torch.logspace(0.3, -0.7, PIXELS)
    return [content + 0.2 * normal(number, PIXELS, seed=seed + k) for k in (1, 2)]


def batches(number=16, size=64):
    return [pairs(size, seed=10 * index) for index in range(number)]


def encoder(alpha=1e-3, seed=0):
    torch.manual_seed(seed)
    layers = [nn.Flatten(), nn.Linear(PIXELS, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(), nn.Linear(16, DIM)]
    with torch.no_grad():
        layers[-1].weight.mul_(alpha)
    return nn.Sequential(*layers)


def module(cls=BarlowTwins, alpha=1e-3, rate=0.02, **settings):
    return cls(encoder(alpha), rate, **((ANALYTICAL if cls is BarlowTwins else {}) | settings))


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


def test_only_the_first_mode_of_the_spectral_contrastive_loss_has_a_measured_error():
    result = forecast(module(SpectralContrastive), batches(8), 400)
    assert result.matrix == "cross_correlation"
    assert result.step_times.isfinite().sum() >= 2 and result.errors.isnan().tolist() == [False, True, True, True]
    assert 0 < result.rates.suggested < result.rates.safe < result.rates.limit
    assert "not measured" in str(result) and "not reliable" not in str(result)
    assert result.reliable_eigenvalues(torch.arange(5)).shape == (5, 1)


class WithAnyLoss(JointEmbedding):
    """Module with the loss and the driven matrix in attributes."""

    function = staticmethod(spectral_contrastive_loss)

    def loss_terms(self, z1, z2):
        return {"value": self.function(z1, z2)}


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


@pytest.mark.parametrize("momentum", [0.0, 0.9])
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
    limit = forecast(module(), batches(4), 200).largest_learning_rate
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
    assert result.largest_learning_rate == pytest.approx(limits.even / float(result.growth_rates[0]))
    assert result.suggested_learning_rate < result.rates.safe < result.largest_learning_rate
    single = [forecast(module(momentum=momentum), [batch], 50) for batch in data]
    worst = max(float(one.growth_rates[0]) for one in single)
    assert result.rates.safe == pytest.approx(0.5 * min(limits.local, limits.safe) / worst, rel=1e-6)


@pytest.mark.slow
def test_last_layer_of_vicreg_diverges_above_the_limit():
    model, data = module(VICReg, momentum=0.9, eps=0.01), batches(4)
    result = forecast(model, data, 100)
    assert 0 < result.suggested_learning_rate < result.rates.safe <= result.largest_learning_rate < math.inf
    runs = [
        forecast(model, data, 300, learning_rate=rate) for rate in (1.4 * result.rates.safe, 3 * result.rates.limit)
    ]
    assert [bool(run.eigenvalues.isinf().any()) for run in runs] == [False, True]
    assert any("diverges" in text for text in runs[1].warnings)


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


class Pairs(L.LightningDataModule):
    """Equal training batches in each epoch, and probe pairs."""

    rest = 0

    def train_dataloader(self):
        return DataLoader(batches(8) + ([pairs(self.rest)] if self.rest else []), batch_size=None)

    def probe_pairs(self):
        return pairs(128, seed=1000)


class SmallerLastBatch(Pairs):
    """Data whose epochs end with a smaller batch."""

    rest = 10


def trained(tmp_path, cls, *callbacks, steps=80, data=Pairs, ckpt_path=None, **settings):
    torch.manual_seed(0)
    model = module(cls, **settings)
    spectra = SpectrumLogger(
        matrices=["cross_correlation", "covariance", "tangent_covariance"], center=True, num_points=40
    )
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, callbacks=[*callbacks, spectra], enable_model_summary=False,
        enable_checkpointing=False, enable_progress_bar=any(isinstance(c, LineProgress) for c in callbacks),
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, datamodule=data(), ckpt_path=ckpt_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    return model, spectra.record


class RecordingProgress(LineProgress):
    """Progress lines that are kept in a list."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def print(self, *text, **_):
        self.lines.append(" ".join(map(str, text)))


class RecordingForecasts(ForecastLogger):
    """ForecastLogger that keeps forecasts without plateau correction, and the texts of the progress bar by step."""

    def __init__(self):
        super().__init__(cost=1.0)
        self.uncorrected, self.texts = [], {}

    def _summary(self, step):
        return self.texts.setdefault(step, super()._summary(step))

    def _forecast(self, *arguments):
        result = super()._forecast(*arguments)
        self.uncorrected.append(result[0])
        return result


@pytest.fixture(scope="module")
def live_run(tmp_path_factory):
    """Return the callbacks and the record of a run of Barlow Twins with live forecasts."""
    live, progress = RecordingForecasts(), RecordingProgress()
    _, record = trained(tmp_path_factory.mktemp("live"), BarlowTwins, live, progress, steps=150)
    return live, progress, record


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("cls", [*(pytest.param(c, marks=pytest.mark.slow) for c in (BarlowTwins, VICReg)), SimCLR])
def test_training_is_bit_identical_with_live_forecasts(tmp_path, cls):
    live = ForecastLogger(cost=1.0)
    (model, record), (without, other) = (
        trained(tmp_path, cls, *callbacks, data=SmallerLastBatch) for callbacks in ([live], [])
    )
    for name, value in model.state_dict().items():
        assert torch.equal(value, without.state_dict()[name]), name
    assert torch.equal(record.eigenvalues(), other.eigenvalues())
    assert len(live.forecasts) >= 3
    assert not any(part._forward_pre_hooks for part in model.modules())
    if cls is SimCLR:
        h1, h2 = live._features(64)
        assert h1.shape == h2.shape == (64, 64, 16)  # 4096 pairs, without the smaller last batches
        # The simulation runs to the end of training, even if the next mode is expected earlier.
        result, rates = live._forecast(model, torch.optim.SGD(model.parameters(), 0.02), 64, 20, 80)
        assert (result.start, result.max_steps, len(rates)) == (20, 80, 60) and result.steps[-1] == 80


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_live_forecast_of_a_loss_without_a_name(tmp_path):
    live = ForecastLogger(cost=1.0)
    model, record = trained(tmp_path, WithAnyLoss, live, steps=60, rate=0.004)
    first = live.forecasts[0]
    measured = record.detect_steps("covariance").step_times[0] / 0.004
    assert first.num_learned == 0 and first.expected_step == pytest.approx(float(measured), rel=0.3)
    h1, _ = live._features(64)
    assert h1.shape[1:] == (64, 16)
    assert live._features(128)[0].shape == (len(h1) // 2, 128, 16)  # as on two ranks
    result, _ = live._forecast(model, torch.optim.SGD(model.parameters(), 0.02), 128, 20, 60)
    assert result.matrix == "covariance" and result.num_pairs == h1.shape[0] * 64


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_training_goes_on_if_the_loss_cannot_be_simulated(tmp_path, caplog):
    class InFloat32(WithAnyLoss):
        def loss_terms(self, z1, z2):
            return {"value": spectral_contrastive_loss(z1.float(), z2.float())}

    live = ForecastLogger(cost=1.0)
    with caplog.at_level(logging.INFO):
        trained(tmp_path, InFloat32, live, steps=5)
    assert not live.forecasts and "the loss cannot be simulated (" in caplog.text and "remove casts" in caplog.text


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_live_forecasts_approximate_the_measured_step(live_run):
    live, _, record = live_run
    measured = record.detect_steps().step_times / 0.02
    second = [entry for entry in live.forecasts if entry.num_learned == 1]
    assert second and measured[1].isfinite()
    remaining = float(measured[1]) - second[0].step
    assert abs(second[0].expected_step - float(measured[1])) < 0.5 * remaining


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_live_forecasts_are_corrected_for_feature_learning(live_run):
    live, _, _ = live_run
    entries = [
        (corrected, uncorrected.next_mode[1])
        for corrected, uncorrected in zip(live.forecasts, live.uncorrected, strict=True)
        if math.isfinite(corrected.expected_step)
    ]
    assert {entry.num_learned for entry, _ in entries} >= {0, 1}
    for entry, uncorrected in entries:
        assert entry.expected_step == uncorrected if entry.num_learned == 0 else entry.expected_step < uncorrected


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_next_mode_is_printed_and_marked_in_figures(live_run):
    live, progress, record = live_run
    first = live.forecasts[0]
    assert f"forecast: 0 of {DIM} modes learned, next at about step {first.expected_step:.0f}" in progress.lines
    assert all(line.isascii() for line in [*progress.lines, progress.note])  # for output in any encoding
    assert f"of {DIM} modes learned" in progress.note
    # Time is learning rate × steps.
    marked = record.expected_times["cross_correlation"]
    assert marked[0] == pytest.approx(first.expected_step * 0.02, rel=1e-6)
    axis = run_figure(record).axes[len(record.matrices)]  # the first below the losses
    assert any(list(line.get_xdata()) == marked for line in axis.lines)


def assert_small_modes_are_not_learned(live, record):
    """Check that no text counts a mode below half of the threshold as learned, and that its forecast is shown."""
    threshold, grown = record.detect_steps().threshold, record.measure("num_grown")
    small = [
        (live.texts[step + 1], int(count))
        for step, first, count in zip(record.steps.tolist(), record.eigenvalues()[:, 0], grown, strict=True)
        if first < threshold / 2 and step + 1 in live.texts
    ]
    assert max(count for _, count in small) >= 1
    for text, _ in small:
        assert text.startswith(f"0 of {DIM} modes learned, next at about step "), text


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_grown_modes_below_the_threshold_do_not_count_as_learned(live_run):
    live, _, record = live_run
    assert_small_modes_are_not_learned(live, record)
    assert f"2 of {DIM} modes learned" in live.texts[150]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:The dirpath has changed")
def test_grown_modes_do_not_count_as_learned_after_a_resume(tmp_path):
    trained(tmp_path, BarlowTwins, steps=30)
    live = RecordingForecasts()
    _, record = trained(tmp_path, BarlowTwins, live, steps=150, ckpt_path=tmp_path / "last.ckpt")
    assert min(live.texts) == 31 and record.steps[0] == 0
    assert_small_modes_are_not_learned(live, record)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (BarlowTwins, {"optimizer": torch.optim.AdamW}),
        (partial(AcceleratedBarlowTwins, acceleration="gate"), {}),
    ],
)
def test_no_forecast_without_sgd_on_the_gradient_of_the_loss(tmp_path, cls, settings):
    live = ForecastLogger()
    model, _ = trained(tmp_path, cls, live, steps=3, momentum=0.0, **settings)
    assert not live.forecasts
    with pytest.raises(ValueError, match="forecasts assume SGD on the gradient of the loss"):
        forecast(model, batches(2), 10)


def test_forecast_logger_requires_a_spectrum_logger(tmp_path):
    trainer = L.Trainer(
        max_steps=1, accelerator="cpu", logger=False, callbacks=[ForecastLogger()], enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(ValueError, match="needs a SpectrumLogger in the Trainer that measures cross_correlation"):
        trainer.fit(module(), datamodule=Pairs())
    with pytest.raises(ValueError, match="cost must be above 0"):
        ForecastLogger(cost=0)


def test_unseen_batches_are_endless_and_differ_from_training_batches():
    data = TwoViewDataModule(image_size=8, global_batch_size=512)
    data.setup("fit")
    unseen, trained_on = next(iter(unseen_batches(data)))[0], next(iter(data.train_dataloader()))[0]
    assert not torch.equal(unseen, trained_on) and unseen.shape == trained_on.shape
    stream = iter(unseen_batches(Pairs()))
    assert len([next(stream) for _ in range(20)]) == 20


def test_step_of_a_mode_not_learned_before_max_steps_is_infinite():
    result = forecast(module(rate=1e-4), batches(4), 100)
    assert math.isinf(result.step_times[0]) and result.num_learned == 0
    assert result.next_mode == (1, math.inf)
