"""Runs that collapse, each for its own reason, are warned of; runs that learn in steps, or from any start, are not."""

import warnings
from contextlib import suppress

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from stepwise_lightning import BarlowTwins, CollapseMonitor, SimCLR, SpectrumLogger, SpectrumRecord, VICReg
from stepwise_lightning.callbacks.collapse_monitor import find_collapse
from stepwise_lightning.spectrum.record import Measurement, Spectrum

ANALYTICAL = {"off_diagonal_weight": 1.0, "normalize": False, "center": True}
PIXELS, DIM = 20, 8


def pairs(number, seed):
    """Return views whose content has a spectrum, (number, PIXELS) each."""
    generator = torch.Generator().manual_seed(seed)
    content = torch.randn(number, PIXELS, generator=generator) * torch.logspace(0.3, -0.7, PIXELS)
    return [content + 0.2 * torch.randn(number, PIXELS, generator=generator) for _ in range(2)]


class Pairs(L.LightningDataModule):
    """The same training batches each epoch, and pairs to measure on."""

    def train_dataloader(self):
        return DataLoader([pairs(64, seed) for seed in range(8)], batch_size=None)

    def probe_pairs(self):
        return pairs(128, 1000)


class OnlyPositives(SimCLR):
    """Nothing keeps samples apart."""

    def loss_terms(self, z1, z2):
        return {"similarity": -nn.functional.cosine_similarity(z1, z2).mean()}


class Unlike(L.LightningModule):
    """A module that is none of this package's: a classifier, whose logits have few dimensions."""

    def __init__(self):
        super().__init__()
        self.net = encoder(1.0)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        labels = (batch[0][:, 0] > 0).long() + 2 * (batch[0][:, 1] > 0).long()
        return nn.functional.cross_entropy(self(batch[0]), labels)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def encoder(alpha):
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(PIXELS, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, DIM)]
    with torch.no_grad():
        layers[-1].weight.mul_(alpha)
    return nn.Sequential(*layers)


def watched(tmp_path, module, steps):
    """Train; return what was warned of, the callback and the record."""
    watch = CollapseMonitor()
    matrices = ["cross_correlation", "covariance", "normalized_covariance", "tangent_covariance"]
    spectra = SpectrumLogger(matrices=matrices, center=True, num_points=100)
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, callbacks=[watch, spectra], enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, datamodule=Pairs())
    texts = [str(warning.message) for warning in caught]
    return [text for text in texts if text.startswith("step ")], watch, spectra.record


COLLAPSES = {
    "no negatives": (
        lambda: OnlyPositives(encoder(1.0), 0.3, momentum=0.9), "normalized_covariance: complete collapse",
    ),
    "no variance term": (
        lambda: VICReg(encoder(1.0), 0.1, momentum=0.0, variance_weight=0.0), "covariance: complete collapse",
    ),
    "no covariance term": (
        lambda: VICReg(encoder(1e-3), 0.01, momentum=0.0, covariance_weight=0.0),
        "covariance: dimensional collapse: 1 of 8 eigenvalues is above a tenth of the largest since step",
    ),
}  # fmt: skip


@pytest.mark.parametrize("cause", COLLAPSES)
def test_each_kind_of_collapse_is_told_in_one_line(tmp_path, cause):
    module, reading = COLLAPSES[cause]
    told, watch, _ = watched(tmp_path, module(), 300)
    assert any(reading in line for line in told), told
    assert len(told) == len({line.split(": ")[1] for line in told})  # each once
    assert all("\n" not in line for line in told) and watch.found.kind


@pytest.mark.slow
def test_modes_die_where_the_rate_is_a_little_too_high(tmp_path):
    """Between rates that train and rates that end in NaN; exactly where is a matter of round-off."""
    told = []
    for rate in (0.052, 0.054, 0.056, 0.058, 0.06):
        with suppress(FloatingPointError):
            told += watched(tmp_path, BarlowTwins(encoder(1e-3), rate, momentum=0.9, **ANALYTICAL), 300)[0]
    assert any("cross_correlation: a mode has died: eigenvalue" in line for line in told)


def test_a_mode_that_falls_has_died():
    fallen = two_modes(lambda steps: torch.where(steps < 500, steps / 500, 1e-4))
    assert find_collapse(fallen) == ("a mode has died", "eigenvalue 2 is 0.0001 times its maximum")


LEARN = {
    "Barlow Twins, small": lambda: BarlowTwins(encoder(1e-3), 0.02, momentum=0.0, **ANALYTICAL),
    "Barlow Twins, ordinary": lambda: BarlowTwins(encoder(1.0), 0.02, momentum=0.0, **ANALYTICAL),
    "VICReg, small": lambda: VICReg(encoder(1e-3), 0.01, momentum=0.0),
    "VICReg, ordinary": lambda: VICReg(encoder(1.0), 0.01, momentum=0.0),
    "SimCLR, small": lambda: SimCLR(encoder(1e-3), 0.01, momentum=0.9),
    "SimCLR, ordinary": lambda: SimCLR(encoder(1.0), 0.1, momentum=0.9),
    "a classifier": Unlike,
}


@pytest.mark.slow
@pytest.mark.parametrize("run", LEARN)
def test_what_learns_gives_no_alarm(tmp_path, run):
    told, watch, _ = watched(tmp_path, LEARN[run](), 300)
    assert told == [] and watch.found.kind == ""


def two_modes(second):
    """Return a record of ten modes: the first rises at once and stays, the second as told, the others do not."""
    steps = torch.arange(0, 1001, 20)
    eigenvalues = torch.full((len(steps), 10), 1e-8, dtype=torch.float64)
    eigenvalues[1:, 0], eigenvalues[:, 1] = 1.0, second(steps.double())
    return appended(steps, eigenvalues)


def appended(steps, eigenvalues):
    """Return a record that was measured one by one, which counts modes that have grown."""
    record = SpectrumRecord()
    for step, values in zip(steps.tolist(), eigenvalues, strict=True):
        record.append(Measurement(step, 0.01 * step, spectra={"cross_correlation": Spectrum(values)}))
    return record


def test_a_plateau_on_which_the_next_mode_grows_is_no_collapse():
    still, growing = two_modes(lambda steps: 0 * steps + 1e-6), two_modes(lambda steps: 1e-6 * (steps / 100).exp2())
    assert find_collapse(still).kind == "dimensional collapse" and find_collapse(growing).kind == ""


def test_a_forecast_says_how_long_a_plateau_may_last():
    still = two_modes(lambda steps: 0 * steps + 1e-6)
    # From step 20 to 1000: three times as long as until step 300 is over, not three times as long as until 400.
    still.expected_times["cross_correlation"] = [3.0]
    assert find_collapse(still).kind == "dimensional collapse"
    still.expected_times["cross_correlation"] = [4.0]
    assert find_collapse(still).kind == ""


def test_nothing_is_said_before_anything_has_happened():
    flat = SpectrumRecord()
    start = torch.tensor([1e-6, 1e-8, 1e-8, 1e-8, 1e-8], dtype=torch.float64)
    for measurement in SpectrumRecord.of(
        torch.arange(60.0), start.expand(60, 5), steps=torch.arange(60) * 20
    )._measurements:
        flat.append(measurement)
    assert find_collapse(flat).kind == ""


def test_a_run_that_goes_on_with_another_dimension_is_judged_from_there():
    record = two_modes(lambda steps: 0 * steps + 1e-6)
    for step in range(1020, 1200, 20):
        values = torch.full((12,), 0.1, dtype=torch.float64)
        record.append(Measurement(step, 0.01 * step, spectra={"cross_correlation": Spectrum(values)}))
    assert find_collapse(record).kind == ""


def test_it_needs_measurements(tmp_path):
    trainer = L.Trainer(
        max_steps=1, accelerator="cpu", logger=False, callbacks=[CollapseMonitor()], enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with warnings.catch_warnings(), pytest.raises(ValueError, match="CollapseMonitor needs a SpectrumLogger"):
        warnings.simplefilter("ignore")
        trainer.fit(Unlike(), datamodule=Pairs())
