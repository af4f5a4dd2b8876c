"""Spectra and checkpoints with CSV, TensorBoard, W&B and MLflow loggers."""

import csv
from importlib import import_module

import numpy as np
import pytest
import torch
import wandb
from attached import PACKAGES, QUIET, train
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from stepwise_lightning import LastCheckpoint, SpectrumLogger

pytestmark = [pytest.mark.parametrize("package", PACKAGES), *QUIET]


class Csv:
    """CSV file with one column per scalar."""

    def __init__(self, loggers, folder):
        self.logger = loggers.CSVLogger(folder)

    def scalars(self, tag):
        with open(f"{self.logger.log_dir}/metrics.csv", newline="") as file:
            return [(int(row["step"]), float(row[tag])) for row in csv.DictReader(file) if row[tag]]


class TensorBoard:
    """TensorBoard events, in float32."""

    def __init__(self, loggers, folder):
        self.logger = loggers.TensorBoardLogger(folder)

    def scalars(self, tag):
        events = EventAccumulator(self.logger.log_dir, size_guidance={"scalars": 0}).Reload()
        return [(event.step, event.value) for event in events.Scalars(tag)]


class Wandb:
    """Offline run, whose summary holds the last values."""

    def __init__(self, loggers, folder):
        self.logger = loggers.WandbLogger(save_dir=folder, offline=True, project="peers")

    def scalars(self, tag):
        run = self.logger.experiment
        return [(run.summary["trainer/global_step"], run.summary[tag])]  # the history is uploaded later


class MLFlow:
    """File store."""

    def __init__(self, loggers, folder):
        self.logger = loggers.MLFlowLogger(tracking_uri=f"file:{folder}/mlruns")

    def scalars(self, tag):
        history = MlflowClient(self.logger._tracking_uri).get_metric_history(self.logger.run_id, tag)
        return [(metric.step, metric.value) for metric in history]


# Written by a callback of stable-pretraining, where it is installed, and by the W&B service.
OTHERS = {"wandb_resume.json", "debug-internal.log"}
LOGGERS = {"csv": Csv, "tensorboard": TensorBoard, "wandb": Wandb, "mlflow": MLFlow}


@pytest.fixture
def loggers(package, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)
    yield import_module(f"{'lightning.pytorch' if package == 'lightning' else package}.loggers")
    wandb.finish()


def fit(package, loggers, folder):
    boring = import_module(f"{'lightning.pytorch' if package == 'lightning' else package}.demos.boring_classes")
    torch.manual_seed(0)
    loader = DataLoader(boring.RandomDataset(32, 64), batch_size=8)
    spectra, checkpoint = SpectrumLogger(num_scalars=2), LastCheckpoint(every_n_train_steps=5)
    train(
        PACKAGES[package], boring.BoringModel(), loader, folder, spectra, checkpoint,
        logger=loggers, enable_checkpointing=True, limit_val_batches=0,
    )  # fmt: skip
    return spectra, checkpoint


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}


@pytest.mark.parametrize("kind", LOGGERS)
def test_loggers_receive_the_scalars(kind, loggers, package, tmp_path):
    peer = LOGGERS[kind](loggers, tmp_path)
    spectra, _ = fit(package, peer.logger, tmp_path)
    steps = spectra.record.steps.tolist()
    assert steps[0] == 0 and steps[-1] == 16
    for tag, values in (
        ("covariance/eig_000", spectra.record.eigenvalues("covariance")[:, 0]),
        ("normalized_covariance/eig_001", spectra.record.eigenvalues("normalized_covariance")[:, 1]),
        ("covariance/effective_rank", spectra.record.measure("effective_rank", "covariance")),
    ):
        scalars = peer.scalars(tag)
        expected = list(zip(steps, values.tolist(), strict=True))
        np.testing.assert_allclose(scalars, expected[-1:] if kind == "wandb" else expected, rtol=1e-6)


@pytest.mark.parametrize("kind", LOGGERS)
def test_second_run_overwrites_no_file(kind, loggers, package, tmp_path):
    folders = []
    for _ in range(2):
        before = contents(tmp_path)
        peer = LOGGERS[kind](loggers, tmp_path)
        spectra, checkpoint = fit(package, peer.logger, tmp_path)
        wandb.finish()
        assert {path.name for path in spectra.directory.glob("s*")} >= {"spectrum.csv", "spectrum.npz", "steps.json"}
        assert checkpoint.directory == spectra.directory / "checkpoints"
        assert torch.load(checkpoint.directory / "last.ckpt", weights_only=True)["global_step"] == 16
        after = contents(tmp_path)
        assert not [path for path in before if after.get(path) != before[path] and path.name not in OTHERS]
        folders.append(spectra.directory)
    first, second = folders
    assert tmp_path in first.parents and tmp_path in second.parents
    assert not second.is_relative_to(first) and not first.is_relative_to(second)


def test_loggers_receive_the_trajectories_as_an_image(loggers, package, tmp_path):
    for kind in ("wandb", "mlflow"):
        peer = LOGGERS[kind](loggers, tmp_path)
        spectra, _ = fit(package, peer.logger, tmp_path)
        picture = spectra.directory / "trajectories.png"
        assert spectra.picture == picture
        if kind == "wandb":
            (image,) = (tmp_path / "wandb").glob("offline-run-*/files/media/images/spectrum/*.png")
        else:
            (image,) = (tmp_path / "mlruns").glob(f"*/{peer.logger.run_id}/artifacts/spectrum/*.png")
        assert image.read_bytes() == picture.read_bytes()
