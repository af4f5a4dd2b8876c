"""Spectra of a LightningModule of lightly, which derives from ``pytorch_lightning``, not ``lightning``."""

import csv

import numpy as np
import pytest
import pytorch_lightning
import torch
from lightly.utils.benchmarking.linear_classifier import FinetuneClassifier
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stepwise_lightning import SpectrumLogger, TwoViewDataModule
from stepwise_lightning.encoders import ResNet


@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:The `srun` command is available")
def test_spectra_of_lightly_module(tmp_path):
    data = TwoViewDataModule("photos", "weak", image_size=16)
    data.setup("fit")
    backbone = ResNet()
    module = FinetuneClassifier(backbone, 64, feature_dim=backbone.out_features, num_classes=8)
    spectra = SpectrumLogger(watch=["model"], probe=data.probe_pairs()[0], num_points=8)
    trainer = pytorch_lightning.Trainer(
        max_steps=12, log_every_n_steps=4, accelerator="cpu", logger=TensorBoardLogger(tmp_path), callbacks=[spectra],
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(module, data.labelled_train_dataloader())
    with np.load(spectra.directory / "spectrum.npz") as saved:
        eigenvalues, steps = saved["model.covariance"], saved["step"].tolist()
        assert saved["covariance"].shape == (len(steps), 8) and steps[0] == 0 and steps[-1] == 12
    with torch.no_grad():  # batch statistics, as the logger uses them
        z = module.train().model(data.probe_pairs()[0]).double().numpy()
    expected = np.linalg.eigvalsh(np.cov(z.T, bias=True))[::-1]
    np.testing.assert_allclose(eigenvalues[-1], expected, rtol=1e-6, atol=1e-6 * expected[0])
    with (spectra.directory / "spectrum.csv").open(newline="") as file:
        assert {int(row["step"]) for row in csv.DictReader(file)} == set(steps)
    events = EventAccumulator(str(spectra.directory), size_guidance={"tensors": 0}).Reload()
    assert "model/covariance/eig_000" in events.Tags()["scalars"]
    assert (
        "model/covariance/trajectories" in events.Tags()["images"]
        and "custom_scalars__config__" in events.Tags()["tensors"]
    )
