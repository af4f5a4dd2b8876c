"""``ForecastLogger`` with any progress bar and any module."""

import csv
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from tiny_runs import changed, stepwise, write_images
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from stepwise_lightning import (
    BarlowTwins,
    ForecastLogger,
    LinearEncoder,
    SpectrumLogger,
    scale_last_layer,
    spectral_contrastive_loss,
)
from stepwise_lightning.callbacks.progress import describe_bar
from stepwise_lightning.errors import DivergedError
from stepwise_lightning.features import check_watched


class OtherBar(ProgressBar):
    """Progress bar of another library, with an attribute of the same name as tqdm's."""

    train_progress_bar = SimpleNamespace(description="")

    def disable(self) -> None:
        pass


BARS = {"another": OtherBar, "disabled tqdm": lambda: TQDMProgressBar(refresh_rate=0), "tqdm": TQDMProgressBar}
if find_spec("rich"):
    BARS["rich"] = RichProgressBar


@pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:You defined a `validation_step`")
@pytest.mark.parametrize("bar", BARS.values(), ids=BARS)
def test_any_progress_bar(bar, tmp_path, capsys):
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
    live = ForecastLogger(cost=1.0)
    trainer = L.Trainer(
        max_steps=6, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        default_root_dir=tmp_path, callbacks=[bar(), SpectrumLogger(), live],
    )  # fmt: skip
    trainer.fit(BarlowTwins(LinearEncoder(6, 3), 1e-2), DataLoader(TensorDataset(x, x), 8))
    assert live.forecasts
    assert bar == BARS["disabled tqdm"] or "forecast: " in capsys.readouterr().out


def test_description_of_a_rich_bar():
    updates = []
    bar = RichProgressBar.__new__(RichProgressBar)  # rich may not be installed
    bar.progress, bar.train_progress_bar_id = None, None
    describe_bar(bar, "before training")
    bar.progress = SimpleNamespace(update=lambda *task, description: updates.append((*task, description)))
    bar.train_progress_bar_id = 3
    describe_bar(bar, "Epoch 1, 2 of 10 modes learned")
    assert updates == [(3, "Epoch 1, 2 of 10 modes learned")]


def own_module(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train a module with the callbacks of the configurations of the package, which watch ``encoder.backbone``."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path)
    callbacks = [
        {"class_path": "stepwise_lightning.SpectrumLogger", "init_args": {"watch": ["encoder.backbone"]}},
        *({"class_path": f"stepwise_lightning.{each}"} for each in ("ForecastLogger", "CollapseMonitor", "OnlineKNN")),
    ]
    stepwise("fit", f"--model=own_modules.{name}", config=changed({"trainer.callbacks": callbacks}))


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`")
@pytest.mark.parametrize("name", ["Mine", "WithEncoder", "WithBackbone"])
def test_module_with_another_loss_trains_without_a_forecast(name, tmp_path, monkeypatch, caplog):
    own_module(name, tmp_path, monkeypatch)
    lines = [line for line in caplog.messages if "no forecast of the next mode" in line]
    assert len(lines) == 1 and f"{name} has no loss of this package" in lines[0]
    (table,) = Path("runs").rglob("spectrum.csv")
    has_backbone = name == "WithBackbone"
    assert ("encoder.backbone" in table.read_text()) == has_backbone
    unwatched = f"encoder.backbone is not watched, and there is no OnlineKNN: {name} has no such submodule"
    assert (unwatched in caplog.messages) == (not has_backbone)


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`")
def test_module_without_forward_trains_without_spectra(tmp_path, monkeypatch, caplog):
    own_module("WithoutForward", tmp_path, monkeypatch)
    assert "no spectra and no forecast: WithoutForward has no forward(view)" in caplog.messages
    assert list(Path("runs").rglob("last.ckpt")) and not list(Path("runs").rglob("spectrum.csv"))


def test_module_without_forward_is_refused_by_the_spectrum_logger():
    with pytest.raises(
        ValueError, match=r"LightningModule has no forward\(view\), whose output is measured: define it"
    ):
        check_watched(L.LightningModule(), ("",))
    check_watched(L.LightningModule(), ())


class OwnLoop(L.LightningModule):
    """A module of another package, trained with the spectral contrastive loss."""

    def __init__(self):
        super().__init__()
        self.net = scale_last_layer(nn.Linear(6, 3), 1e-2)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return spectral_contrastive_loss(self(batch[0]), self(batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-2)


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_module_of_another_package_with_a_function_as_its_loss(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(64, 6) * torch.tensor([2.0, 1.0, 0.5, 0.3, 0.2, 0.1])
    live, spectra = ForecastLogger(cost=1.0, loss=spectral_contrastive_loss), SpectrumLogger()
    trainer = L.Trainer(
        max_steps=150, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False, default_root_dir=tmp_path, callbacks=[spectra, live],
    )  # fmt: skip
    trainer.fit(OwnLoop(), DataLoader(TensorDataset(x, x), 64))
    measured = spectra.record.detect_steps("covariance").step_times / 1e-2
    assert live.forecasts[0].expected_step == pytest.approx(float(measured[0]), rel=0.03)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`", "ignore:.*your dataloader is not resumable")
def test_learned_modes_are_logged_and_marks_are_restored_when_training_resumes(tmp_path):
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))

    def trained(steps: int, **options) -> tuple[ForecastLogger, SpectrumLogger, L.Trainer]:
        live, spectra = ForecastLogger(cost=1.0), SpectrumLogger(center=True)
        trainer = L.Trainer(
            max_steps=steps, accelerator="cpu", logger=CSVLogger(tmp_path), enable_checkpointing=False,
            enable_model_summary=False, enable_progress_bar=False, log_every_n_steps=1,
            default_root_dir=tmp_path, callbacks=[spectra, live],
        )  # fmt: skip
        module = BarlowTwins(
            LinearEncoder(6, 3, init_std=1e-2), 2e-2, normalize=False, center=True, off_diagonal_weight=1.0
        )
        trainer.fit(module, DataLoader(TensorDataset(x, x), 8), **options)
        return live, spectra, trainer

    live, before, trainer = trained(100)
    with open(f"{trainer.logger.log_dir}/metrics.csv", newline="") as file:
        learned = [float(value) for row in csv.DictReader(file) if (value := row["At a glance/num_learned"])]
    assert learned[0] == 0 and learned[-1] == (before.record.eigenvalues()[-2] > live.threshold).sum() >= 2
    marks = before.record.expected_times["cross_correlation"]
    assert len(marks) >= 2
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    _, after, _ = trained(102, ckpt_path=tmp_path / "end.ckpt")
    assert after.record.expected_times["cross_correlation"][: len(marks)] == marks
    _, other, _ = trained(3)
    assert not set(other.record.expected_times.get("cross_correlation", [])) & set(marks[1:])


def test_learning_rate_above_the_limit_is_reported(tmp_path, capsys):
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    module = BarlowTwins(LinearEncoder(6, 3, init_std=1e-4, seed=0), 1.0, normalize=False, off_diagonal_weight=1.0)
    trainer = L.Trainer(
        max_steps=30, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        default_root_dir=tmp_path, callbacks=[SpectrumLogger(), ForecastLogger(cost=1.0)], log_every_n_steps=1,
    )  # fmt: skip
    with pytest.raises(DivergedError):
        trainer.fit(module, DataLoader(TensorDataset(x, x), 64))
    assert "0 of 3 modes learned, training is expected to diverge: lower the learning rate" in capsys.readouterr().out
