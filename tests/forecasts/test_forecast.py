"""Forecasts against training: of the last layer alone, of small networks, and on the command line."""

import math
from functools import partial

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from stepwise_lightning import (
    AcceleratedBarlowTwins,
    BarlowTwins,
    ForecastLogger,
    SimCLR,
    SpectrumLogger,
    SpectrumRecord,
    TwoViewDataModule,
    VICReg,
    forecast,
)
from stepwise_lightning.callbacks.progress import LineProgress
from stepwise_lightning.forecasts.forecast import Forecast, correct_for_feature_learning
from stepwise_lightning.forecasts.learning_rates import StableRates
from stepwise_lightning.forecasts.sgd import SGDSettings, last_layer
from stepwise_lightning.forecasts.simulate import forecast_of_features, unseen_batches
from stepwise_lightning.plots import run_figure
from stepwise_lightning.spectrum import detect_steps
from stepwise_lightning.theory import stability_limits

ANALYTICAL = {"off_diagonal_weight": 1.0, "normalize": False, "center": True}
PIXELS, DIM = 20, 4


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pairs(number, seed=0):
    """Return views whose content has a spectrum, (number, PIXELS) each."""
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


def test_nothing_of_the_module_is_changed():
    model = module()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, training = torch.get_rng_state(), [part.training for part in model.modules()]
    forecast(model, batches(2), 50)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in model.modules()] == training and all(training)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_a_classifier_beside_the_encoder_is_not_its_last_layer():
    model = module()
    said = forecast(model, batches(2), 50)
    model.classifier = nn.Linear(DIM, 3)
    assert torch.equal(forecast(model, batches(2), 50).step_times, said.step_times)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_step_times_are_those_of_training_the_last_layer_alone(momentum):
    model, data, rate = module(momentum=momentum), batches(3), 0.004 if momentum else 0.02
    said = forecast(model, data, 400, learning_rate=rate)
    layer, network = last_layer(model), model.encoder[:-2]
    network[2].momentum = 0.0  # batch statistics, and nothing is recorded
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
    torch.testing.assert_close(said.step_times[learned], expected[learned], rtol=0.03, atol=0.5)


def test_a_schedule_is_followed_step_by_step():
    model = module(warmup_steps=100, cosine=True)
    said, constant = (forecast(model, batches(8), 400, **rate) for rate in ({}, {"learning_rate": 0.02}))
    rates = [0.02 * min((k + 1) / 100, (1 + math.cos(math.pi * max(k - 100, 0) / 300)) / 2) for k in range(400)]
    same = forecast(model, batches(8), 400, learning_rate=rates)
    torch.testing.assert_close(said.step_times, same.step_times)
    assert 1.3 * constant.step_times[0] < said.step_times[0] < 200
    with pytest.raises(ValueError, match="one for each of the 400 steps to come"):
        forecast(model, batches(2), 400, learning_rate=[0.1, 0.1])


def test_a_modules_own_settings_can_be_given_for_another_module():
    own = forecast(module(momentum=0.5), batches(4), 100)
    other = forecast(
        encoder(), batches(4), 100, loss="barlow_twins", settings=ANALYTICAL, learning_rate=0.02, momentum=0.5
    )
    assert torch.equal(own.step_times, other.step_times) and own.rates == other.rates
    for missing, message in (({}, "give loss="), ({"loss": "vicreg"}, "learning_rate must be given")):
        with pytest.raises(ValueError, match=message):
            forecast(encoder(), batches(2), 100, **missing)


def test_a_module_that_does_not_end_in_its_last_linear_layer_is_refused():
    model = nn.Sequential(encoder(), nn.Tanh())
    with pytest.raises(ValueError, match="does not end in its last linear layer"):
        forecast(model, batches(2), 100, loss="vicreg", learning_rate=0.1)
    with pytest.raises(ValueError, match="no linear layer"):
        forecast(nn.Conv2d(3, 3, 1), batches(2), 100, loss="vicreg", learning_rate=0.1)


def test_warnings_say_what_may_be_wrong():
    said = " ".join(forecast(module(alpha=10.0), batches(1), 50).warnings)
    assert "64 pairs are few for 16 features" in said and "no separated steps" in said
    assert not forecast(module(), batches(4), 200).warnings
    limit = forecast(module(), batches(4), 200).largest_learning_rate
    assert any("above the limit" in text for text in forecast(module(rate=1.1 * limit), batches(4), 200).warnings)
    assert any(
        "below which it is safe" in text for text in forecast(module(rate=0.7 * limit), batches(4), 200).warnings
    )
    starved = forecast(module(weight_decay=0.3), batches(4), 200).warnings
    assert any("weight decay 0.3 is not small" in text for text in starved)
    assert any("no small start" in text for text in forecast(module(SimCLR, alpha=1.0), batches(4), 50).warnings)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_limits_of_barlow_twins_are_those_of_the_theory(momentum):
    said, data = forecast(module(momentum=momentum), batches(4), 50), batches(4)
    limits = stability_limits(momentum)
    assert said.largest_learning_rate == pytest.approx(limits.even / float(said.growth_rates[0]))
    assert said.suggested_learning_rate < said.rates.safe < said.largest_learning_rate
    single = [forecast(module(momentum=momentum), [batch], 50) for batch in data]
    worst = max(float(one.growth_rates[0]) for one in single)
    assert said.rates.safe == pytest.approx(0.5 * min(limits.local, limits.safe) / worst, rel=1e-6)


@pytest.mark.slow
def test_the_limits_of_vicreg_lie_where_its_last_layer_diverges():
    model, data = module(VICReg, momentum=0.9, eps=0.01), batches(4)
    said = forecast(model, data, 100)
    assert 0 < said.suggested_learning_rate < said.rates.safe <= said.largest_learning_rate < math.inf
    fates = [forecast(model, data, 300, learning_rate=rate) for rate in (1.4 * said.rates.safe, 3 * said.rates.limit)]
    assert [bool(fate.eigenvalues.isinf().any()) for fate in fates] == [False, True]
    assert any("diverges" in text for text in fates[1].warnings)


def test_what_is_not_promised_is_said():
    for cls, count in ((BarlowTwins, DIM), (VICReg, 1)):
        said = forecast(module(cls, rate=0.005, **({"eps": 0.01} if cls is VICReg else {})), batches(4), 300)
        assert said.errors.isfinite().sum() == count
        assert said.reliable_eigenvalues(said.steps).shape == (len(said.steps), count)
        assert str(said).count("not promised") == int(said.step_times[count:].isfinite().sum())
        assert "suggested" in str(said)


def test_a_forecast_goes_on_from_a_running_optimiser():
    """Frozen features, simulated to the end from the start, and from half-way with the velocity there."""
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


def test_what_remains_of_barlow_twins_shortens_along_a_plateau():
    assert correct_for_feature_learning("barlow_twins", 100, 100, 200) == 200  # just learned
    assert correct_for_feature_learning("barlow_twins", 100, 150, 200) == pytest.approx(150 + 50 * (1 - 0.3 / 2))
    assert correct_for_feature_learning("barlow_twins", 100, 199, 200) == pytest.approx(199.7, abs=0.01)
    for loss, learned_at, step, due in (
        ("vicreg", 100, 150, 200),
        ("simclr", 100, 150, 200),
        ("barlow_twins", 100, 150, math.inf),
        ("barlow_twins", 100, 150, 150),
    ):
        assert correct_for_feature_learning(loss, learned_at, step, due) == due


def test_measurements_shorten_what_remains_after_the_last_mode_was_learned():
    steps = torch.tensor([0, 50, 100, 101, 102, 150])
    said = Forecast(
        "barlow_twins", 150, 1000, 0.1, 0.0, 64, torch.tensor([math.nan, 200.0, math.inf], dtype=torch.float64),
        torch.tensor([150, 1000]), torch.tensor([[1.0, 1e-4, 1e-6], [1.0, 1.0, 1e-5]], dtype=torch.float64), 0.1,
        torch.zeros(3), StableRates(1.0, 1.0, 1.0), (),
    )  # fmt: skip
    values = torch.full((6, 3), 1e-6, dtype=torch.float64)
    values[2:, 0] = 0.1 + 1e-12  # from step 100 on
    due = correct_for_feature_learning("barlow_twins", 100, 150, 200)
    assert due < 199
    known = said.with_plateau_correction(SpectrumRecord.of(steps, values, steps=steps))
    assert known.next_mode == (2, pytest.approx(due, abs=1e-6)) and known.step_times[2] == math.inf
    unknown = SpectrumRecord.of(steps, values, matrix="covariance", steps=steps)
    learned_before = SpectrumRecord.of(steps[2:], values[2:], steps=steps[2:])
    for record in (unknown, learned_before, SpectrumRecord()):
        assert said.with_plateau_correction(record) is said


class Pairs(L.LightningDataModule):
    """The same training batches each epoch, and pairs to measure on."""

    rest = 0

    def train_dataloader(self):
        return DataLoader(batches(8) + ([pairs(self.rest)] if self.rest else []), batch_size=None)

    def probe_pairs(self):
        return pairs(128, seed=1000)


class WithRest(Pairs):
    """An epoch ends with a smaller batch."""

    rest = 10


def trained(tmp_path, cls, *callbacks, steps=80, data=Pairs, **settings):
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
    trainer.fit(model, datamodule=data())
    return model, spectra.record


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("cls", [pytest.param(BarlowTwins, marks=pytest.mark.slow), VICReg, SimCLR])
def test_training_is_bit_identical_with_live_forecasts(tmp_path, cls):
    live = ForecastLogger(cost=1.0)
    (with_, record), (without, other) = (trained(tmp_path, cls, *callbacks) for callbacks in ([live], []))
    for name, value in with_.state_dict().items():
        assert torch.equal(value, without.state_dict()[name]), name
    assert torch.equal(record.eigenvalues(), other.eigenvalues())
    assert len(live.forecasts) >= 3
    assert not any(part._forward_pre_hooks for part in with_.modules())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_simclr_goes_by_the_last_whole_batches(tmp_path):
    live = ForecastLogger(cost=1.0)
    model, _ = trained(tmp_path, SimCLR, live, steps=80, data=WithRest)
    h1, h2 = live._features(64)
    assert h1.shape == h2.shape == (64, 64, 16)  # 4096 pairs, none of the rest of an epoch
    assert live.forecasts
    # By the plateau at the end of training, also where the next mode is due long before.
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    said, rates = live._forecast(model, optimizer, 64, 20, 80)
    assert (said.start, said.max_steps, len(rates)) == (20, 80, 60) and said.steps[-1] == 80


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_live_forecasts_come_close_to_what_is_measured(tmp_path):
    live = ForecastLogger(cost=1.0)
    _, record = trained(tmp_path, BarlowTwins, live, steps=150)
    measured = record.detect_steps().step_times / 0.02
    second = [said for said in live.forecasts if said.num_learned == 1]
    assert second and measured[1].isfinite()
    remaining = float(measured[1]) - second[0].step
    assert abs(second[0].expected_step - float(measured[1])) < 0.5 * remaining


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_live_forecasts_reckon_with_features_that_move(tmp_path, monkeypatch):
    moving = ForecastLogger(cost=1.0)
    trained(tmp_path, BarlowTwins, moving, steps=150)
    monkeypatch.setattr("stepwise_lightning.forecasts.forecast._FEATURE_LEARNING_CORRECTION", {})
    staying = ForecastLogger(cost=1.0)
    trained(tmp_path, BarlowTwins, staying, steps=150)
    later = {(said.step, said.num_learned): said.expected_step for said in staying.forecasts}
    both = [
        (said, later[said[:2]]) for said in moving.forecasts if said[:2] in later and math.isfinite(said.expected_step)
    ]
    assert {said.num_learned for said, _ in both} >= {0, 1}
    for said, due in both:
        assert said.expected_step == due if said.num_learned == 0 else said.expected_step < due


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_next_mode_is_said_marked_and_not_forecast_without_sgd(tmp_path, capsys):
    live, progress = ForecastLogger(cost=1.0), LineProgress()
    _, record = trained(tmp_path, BarlowTwins, live, progress, steps=80)
    first = live.forecasts[0]
    assert f"forecast: 0 of {DIM} modes learned, next ≈ step {first.expected_step:.0f}" in capsys.readouterr().out
    assert f"of {DIM} modes learned" in progress.note
    # Time is learning rate × steps, from the last measurement on.
    marked = record.expected_times["cross_correlation"]
    assert marked[0] == pytest.approx(first.expected_step * 0.02, rel=1e-6)
    axis = run_figure(record).axes[len(record.matrices)]  # the first below the losses
    assert any(list(line.get_xdata()) == marked for line in axis.lines)
    accelerated = partial(AcceleratedBarlowTwins, acceleration="gate")
    for cls, other in ((BarlowTwins, {"optimizer": torch.optim.AdamW, **ANALYTICAL}), (accelerated, {})):
        silent = ForecastLogger()
        model, _ = trained(tmp_path, cls, silent, steps=3, momentum=0.0, **other)
        assert not silent.forecasts
        with pytest.raises(ValueError, match="forecasts assume SGD on the gradient of the loss"):
            forecast(model, batches(2), 10)


def test_live_forecasts_need_measurements(tmp_path):
    trainer = L.Trainer(
        max_steps=1, accelerator="cpu", logger=False, callbacks=[ForecastLogger()], enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(ValueError, match="needs a SpectrumLogger in the Trainer that measures cross_correlation"):
        trainer.fit(module(), datamodule=Pairs())
    with pytest.raises(ValueError, match="cost must be above 0"):
        ForecastLogger(cost=0)


def test_unseen_batches_never_end_and_are_not_those_of_training():
    data = TwoViewDataModule(image_size=8, global_batch_size=512)
    data.setup("fit")
    unseen, trained_on = next(iter(unseen_batches(data)))[0], next(iter(data.train_dataloader()))[0]
    assert not torch.equal(unseen, trained_on) and unseen.shape == trained_on.shape
    stream = iter(unseen_batches(Pairs()))
    assert len([next(stream) for _ in range(20)]) == 20


def test_a_first_mode_that_is_not_learned_in_time_is_infinite():
    said = forecast(module(rate=1e-4), batches(4), 100)
    assert math.isinf(said.step_times[0]) and said.num_learned == 0
    assert said.next_mode == (1, math.inf)
