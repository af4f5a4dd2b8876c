"""Results of ``ddp_fork`` and ``ddp_spawn`` in the calling process."""

from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from fresh_processes import stepwise
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tiny_runs import CONFIG, write_images
from torch.utils.data import DataLoader, TensorDataset

from stepwise_lightning import BarlowTwins, LastCheckpoint, LinearEncoder, SpectrumLogger, SpectrumRecord
from stepwise_lightning.runs import AtomicCheckpointIO

PROCESSES = {"accelerator": "cpu", "devices": 2, "strategy": "ddp_fork"}


def train(has_logger: bool) -> None:
    x = torch.randn(16, 4)
    spectra = [SpectrumLogger(), SpectrumLogger(num_points=3)]
    trainer = L.Trainer(
        max_steps=6, log_every_n_steps=1, logger=TensorBoardLogger(".") if has_logger else False,
        enable_progress_bar=False,
        plugins=[AtomicCheckpointIO()], callbacks=[LastCheckpoint(), *spectra, ModelCheckpoint("best")], **PROCESSES,
    )  # fmt: skip
    trainer.fit(BarlowTwins(LinearEncoder(4, 3), 1e-3), DataLoader(TensorDataset(x, x), 4))
    folder = Path("lightning_logs/version_0" if has_logger else "stepwise_runs/version_0").absolute()
    assert trainer.global_step == 6
    for name, logger in zip(("spectrum", "spectrum_1"), spectra, strict=True):
        saved = SpectrumRecord.load(folder / f"{name}.npz")
        assert logger.directory.absolute() == folder
        assert torch.equal(logger.record.eigenvalues(), saved.eigenvalues()) and len(saved) > 1


@pytest.mark.parametrize("has_logger", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_calling_process_has_record_and_folder(has_logger, processes, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    processes.run(train, has_logger)


@pytest.mark.parametrize("spectra", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_report_names_folder_and_steps(spectra, processes, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path)
    options = [f"--trainer.{name}={value}" for name, value in PROCESSES.items()]
    options += [] if spectra else ["--trainer.callbacks=[]"]
    Path("mine.yaml").write_text(yaml.safe_dump(CONFIG))
    (outcome,) = processes.launch(stepwise, "fit", "--config=mine.yaml", *options)
    assert outcome.status == 0, outcome.output
    assert "run      runs/lightning_logs/version_0, 2 steps" in outcome.output
