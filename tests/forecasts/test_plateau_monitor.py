"""``PlateauMonitor`` warns of plateaus that are too long, with their cause, and of no run that learns."""

import csv
import math
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from stepwise_lightning import (
    BarlowTwins,
    ForecastLogger,
    JointEmbedding,
    PlateauMonitor,
    SpectrumLogger,
    SpectrumRecord,
    VICReg,
    scale_last_layer,
    spectral_contrastive_loss,
)
from stepwise_lightning.callbacks.forecast_logger import LiveForecast
from stepwise_lightning.callbacks.plateau_monitor import expected_step
from stepwise_lightning.forecasts.run_state import run_state

ANALYTICAL = {"off_diagonal_weight": 1.0, "normalize": False, "center": True}


def pairs(shared, seed):
    """Return two views (64, 8); the first of the eight features has the largest variance."""
    generator = torch.Generator().manual_seed(seed)
    content, *noise = torch.randn(3, 64, 8, generator=generator) * torch.logspace(0, -1, 8)
    return [shared * content + 0.3 * each for each in noise]


class Pairs(L.LightningDataModule):
    """Identical batches each epoch, and probe pairs."""

    def __init__(self, shared=1.0):
        super().__init__()
        self.shared = shared

    def train_dataloader(self):
        return DataLoader([pairs(self.shared, seed) for seed in range(16)], batch_size=None)

    def probe_pairs(self):
        return pairs(1.0, 1000)


def fit(tmp_path, module=BarlowTwins, data=None, steps=240, forecast=True, monitor=True, **settings):
    """Train a linear layer; return the monitor, its warnings, the logged levels and the weights."""
    torch.manual_seed(0)
    settings = (ANALYTICAL if module is BarlowTwins else {}) | {"learning_rate": 0.1} | settings
    trained = module(nn.Sequential(scale_last_layer(nn.Linear(8, 3), 0.01)), **settings)
    spectra = SpectrumLogger(num_points=40, matrices=[trained.driven_matrix or "covariance"], center=True)
    watch = PlateauMonitor()
    callbacks = [spectra, *([ForecastLogger(cost=1.0)] * forecast), *([watch] * monitor)]
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", callbacks=callbacks, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, logger=CSVLogger(tmp_path), log_every_n_steps=1,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(trained, datamodule=data or Pairs())
    lines = [str(each.message) for each in caught if str(each.message).startswith("step ")]
    with open(f"{trainer.logger.log_dir}/metrics.csv", encoding="utf-8") as file:
        levels = [float(row["plateau/level"] or "nan") for row in csv.DictReader(file)] if monitor else []
    levels = [level for level in levels if level == level]
    return watch, lines, levels, trained.encoder[0].weight


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_plateau_and_its_cause_are_reported_once(tmp_path):
    watch, lines, levels, weight = fit(tmp_path, weight_decay=9.0)
    first, second = lines
    assert first.endswith("no mode learned since step 0, and none is expected before training ends")
    assert "weight decay is not below the growth rate (" in second and second.endswith(": lower the weight decay")
    assert watch.diagnosis.verdict == "stuck" and levels[-1] == 2 and set(levels) <= {0, 1, 2}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("forecast", [True, False])
def test_plateau_of_a_function_is_reported(forecast, tmp_path):
    options = {"loss": spectral_contrastive_loss, "learning_rate": 1e-9, "forecast": forecast}
    watch, lines, levels, weight = fit(tmp_path, JointEmbedding, **options)
    assert lines[0].endswith("no mode learned since step 0, and none is expected before training ends")
    assert "the learning rate is too low (" in lines[1] and watch.diagnosis.verdict == "stuck" and levels[-1] == 2
    assert torch.equal(weight, fit(tmp_path, JointEmbedding, monitor=False, **options)[-1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_training_with_and_without_the_monitor_is_equal(tmp_path):
    options = {"data": Pairs(0.0), "learning_rate": 0.02}
    _, lines, _, with_monitor = fit(tmp_path, **options)
    assert any("pairs share nothing beyond chance" in line for line in lines)
    assert torch.equal(with_monitor, fit(tmp_path, monitor=False, **options)[-1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("module", "forecast", "settings"),
    [
        (BarlowTwins, False, {}),
        (VICReg, True, {"eps": 0.01}),
        (JointEmbedding, False, {"loss": spectral_contrastive_loss}),
    ],
    ids=["Barlow Twins", "VICReg", "function"],
)
def test_run_that_learns_is_not_warned_of(module, forecast, settings, tmp_path):
    watch, lines, levels, _ = fit(tmp_path, module, forecast=forecast, steps=600, **settings)
    assert not lines and set(levels) == {0} and watch.diagnosis is None


def test_forecasts_of_an_earlier_plateau_are_ignored():
    """The second mode of this record is learned at step 20, lost at step 60, and learned again at step 80."""
    second = torch.tensor([1e-6, 1e-3, 0.9, 0.9, 0.9, 0.9, 1e-3, 1e-3, 0.9, 0.9, 0.9], dtype=torch.float64)
    eigenvalues = torch.stack([torch.full_like(second, 0.95), second, torch.full_like(second, 1e-6)], 1)
    steps = torch.arange(0, 110, 10)

    def expected(count, *forecasts):
        record = SpectrumRecord.of(steps[:count].double(), eigenvalues[:count], steps=steps[:count])
        state = run_state(record, "cross_correlation", "barlow_twins", {"normalize": False})
        return state.num_learned, state.since, expected_step(record.steps, forecasts, state)

    first, lost, late = LiveForecast(15, 2, 50.0), LiveForecast(65, 1, 70.0), LiveForecast(75, 2, 140.0)
    assert expected(6, first) == (2, 20, 50)
    assert expected(8, first, lost) == (1, 60, 70)
    assert expected(11, first, lost, late, LiveForecast(95, 2, 170.0)) == (2, 80, 140)
    assert math.isnan(expected(11, first, lost)[2])


def test_monitor_needs_a_spectrum_logger():
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(ValueError, match="needs a SpectrumLogger"):
        PlateauMonitor().on_train_start(trainer, BarlowTwins(nn.Linear(8, 3), 0.1))
