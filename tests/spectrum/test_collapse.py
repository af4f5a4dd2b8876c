"""CollapseMonitor warns of runs that collapse, and of no run that learns."""

import warnings
from contextlib import suppress

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from stepwise_lightning import (
    BarlowTwins,
    CollapseMonitor,
    CollapseWatch,
    PlateauMonitor,
    SimCLR,
    SpectrumLogger,
    SpectrumRecord,
    VICReg,
)
from stepwise_lightning.callbacks.collapse_monitor import find_collapse
from stepwise_lightning.spectrum.record import Measurement, Spectrum

ANALYTICAL = {"off_diagonal_weight": 1.0, "normalize": False, "center": True}
PIXELS, DIM = 20, 8


def pairs(number, seed):
    """Return two views with a decaying spectrum, (number, PIXELS) each."""
    generator = torch.Generator().manual_seed(seed)
    content = torch.randn(number, PIXELS, generator=generator) * torch.logspace(0.3, -0.7, PIXELS)
    return [content + 0.2 * torch.randn(number, PIXELS, generator=generator) for _ in range(2)]


class Pairs(L.LightningDataModule):
    """Identical training batches each epoch, and probe pairs."""

    def train_dataloader(self):
        return DataLoader([pairs(64, seed) for seed in range(8)], batch_size=None)

    def probe_pairs(self):
        return pairs(128, 1000)


class OnlyPositives(SimCLR):
    """Loss without a repulsive term."""

    def loss_terms(self, z1, z2):
        return {"similarity": -nn.functional.cosine_similarity(z1, z2).mean()}


class LogitClassifier(L.LightningModule):
    """Supervised classifier, whose logits have few dimensions."""

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


def monitored(tmp_path, module, steps, *others):
    """Train with other callbacks, too; return the warnings and the CollapseMonitor."""
    monitor = CollapseMonitor()
    matrices = ["cross_correlation", "covariance", "normalized_covariance", "tangent_covariance"]
    spectra = SpectrumLogger(matrices=matrices, center=True, num_points=60)
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, callbacks=[monitor, *others, spectra],
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, datamodule=Pairs())
    texts = [str(warning.message) for warning in caught]
    return [text for text in texts if text.startswith("step ")], monitor


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


@pytest.mark.parametrize(
    "cause", ["no negatives", pytest.param("no variance term", marks=pytest.mark.slow), "no covariance term"]
)
def test_collapse_is_warned_of_once_per_kind(tmp_path, cause):
    module, reading = COLLAPSES[cause]
    lines, monitor = monitored(tmp_path, module(), 300)
    assert any(reading in line for line in lines), lines
    assert len(lines) == len({line.split(": ")[1] for line in lines})
    assert all("\n" not in line for line in lines) and monitor.found.kind


@pytest.mark.slow
def test_mode_dies_at_a_learning_rate_close_to_divergence(tmp_path):
    """The exact rate depends on round-off."""
    lines = []
    for rate in (0.052, 0.054, 0.056, 0.058, 0.06):
        with suppress(FloatingPointError):
            lines += monitored(tmp_path, BarlowTwins(encoder(1e-3), rate, momentum=0.9, **ANALYTICAL), 300)[0]
    assert any("cross_correlation: a mode has died: eigenvalue" in line for line in lines)


def test_mode_that_decays_has_died():
    decayed = two_modes(lambda steps: torch.where(steps < 500, steps / 500, 1e-4))
    assert find_collapse(decayed) == ("a mode has died", "eigenvalue 2 is 0.0001 times its maximum")


LEARN = {
    "Barlow Twins, small": lambda: BarlowTwins(encoder(1e-3), 0.02, momentum=0.0, **ANALYTICAL),
    "Barlow Twins, ordinary": lambda: BarlowTwins(encoder(1.0), 0.02, momentum=0.0, **ANALYTICAL),
    "VICReg, small": lambda: VICReg(encoder(1e-3), 0.01, momentum=0.0),
    "VICReg, ordinary": lambda: VICReg(encoder(1.0), 0.01, momentum=0.0),
    "SimCLR, small": lambda: SimCLR(encoder(1e-3), 0.01, momentum=0.9),
    "SimCLR, ordinary": lambda: SimCLR(encoder(1.0), 0.1, momentum=0.9),
    "classifier": LogitClassifier,
}


@pytest.mark.slow
@pytest.mark.parametrize("run", LEARN)
def test_run_that_learns_is_not_warned_of(tmp_path, run):
    lines, monitor = monitored(tmp_path, LEARN[run](), 300, PlateauMonitor())
    assert lines == [] and monitor.found.kind == ""


def two_modes(second):
    """Return a record of ten modes: the first rises at once, the second is a function of the step, others are zero."""
    steps = torch.arange(0, 1001, 20)
    eigenvalues = torch.full((len(steps), 10), 1e-8, dtype=torch.float64)
    eigenvalues[1:, 0], eigenvalues[:, 1] = 1.0, second(steps.double())
    return appended(steps, eigenvalues)


def appended(steps, eigenvalues):
    """Return a record with ``num_grown``."""
    record = SpectrumRecord()
    for step, values in zip(steps.tolist(), eigenvalues, strict=True):
        record.append(Measurement(step, 0.01 * step, spectra={"cross_correlation": Spectrum(values)}))
    return record


def test_plateau_on_which_the_next_mode_grows_is_no_collapse():
    constant, growing = two_modes(lambda steps: 0 * steps + 1e-6), two_modes(lambda steps: 1e-6 * (steps / 100).exp2())
    assert find_collapse(constant).kind == "dimensional collapse" and find_collapse(growing).kind == ""


def test_expected_times_extend_the_allowed_plateau():
    constant = two_modes(lambda steps: 0 * steps + 1e-6)
    # The plateau lasts from step 20 to 1000: more than 3 × (300 − 20) steps, less than 3 × (400 − 20).
    constant.expected_times["cross_correlation"] = [3.0]
    assert find_collapse(constant).kind == "dimensional collapse"
    constant.expected_times["cross_correlation"] = [4.0]
    assert find_collapse(constant).kind == ""
    # The mode that was learned at step 20 was expected at step 30.
    constant.expected_times["cross_correlation"] = [0.3, 4.0]
    assert find_collapse(constant).kind == ""
    constant.expected_times["cross_correlation"] = [0.3, 3.0]
    assert find_collapse(constant).kind == "dimensional collapse"


def test_constant_spectrum_at_the_start_is_no_collapse():
    flat = SpectrumRecord()
    start = torch.tensor([1e-6, 1e-8, 1e-8, 1e-8, 1e-8], dtype=torch.float64)
    record = SpectrumRecord.of(torch.arange(60.0), start.expand(60, 5), steps=torch.arange(60) * 20)
    for measurement in record.measurements:
        flat.append(measurement)
    assert find_collapse(flat).kind == ""


def test_change_of_the_dimension_restarts_the_check():
    record = two_modes(lambda steps: 0 * steps + 1e-6)
    for step in range(1020, 1200, 20):
        values = torch.full((12,), 0.1, dtype=torch.float64)
        record.append(Measurement(step, 0.01 * step, spectra={"cross_correlation": Spectrum(values)}))
    assert find_collapse(record).kind == ""


def test_collapse_watch_is_deprecated():
    message = r"CollapseWatch is deprecated and will be removed in version 0\.4: use CollapseMonitor"
    with pytest.warns(FutureWarning, match=message) as warned:
        assert isinstance(CollapseWatch(), CollapseMonitor)
    assert [warning.filename for warning in warned] == [__file__]


def test_monitor_requires_a_spectrum_logger(tmp_path):
    trainer = L.Trainer(
        max_steps=1, accelerator="cpu", logger=False, callbacks=[CollapseMonitor()], enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with warnings.catch_warnings(), pytest.raises(ValueError, match="CollapseMonitor needs a SpectrumLogger"):
        warnings.simplefilter("ignore")
        trainer.fit(LogitClassifier(), datamodule=Pairs())
