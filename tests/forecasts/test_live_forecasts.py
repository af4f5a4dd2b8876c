"""``ForecastLogger`` in training of small networks."""

import logging
import math
from functools import partial

import lightning as L
import pytest
import torch
from small_forecasts import DIM, WithAnyLoss, batches, module, pairs
from torch.utils.data import DataLoader

from stepwise_lightning import (
    AcceleratedBarlowTwins,
    BarlowTwins,
    ForecastLogger,
    SimCLR,
    SpectrumLogger,
    TwoViewDataModule,
    VICReg,
    forecast,
    spectral_contrastive_loss,
)
from stepwise_lightning.callbacks.progress import LineProgress
from stepwise_lightning.forecasts.simulate import unseen_batches
from stepwise_lightning.plots import run_figure


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
