"""Stored reference bands: coverage of held-back seeds, and negative controls."""

import lightning as L
import pytest
import torch
import yaml

from reproduce.bands import NUM_POINTS, SETTINGS, linear_record, paths
from reproduce.networks.training import CONFIGS
from stepwise_lightning import BarlowTwins, FixedCropPairs, LinearEncoder, SpectrumLogger
from stepwise_lightning.spectrum import ReferenceBand

STORED = [name for name in SETTINGS if paths(name)[0].exists()]


def test_every_band_has_held_back_runs():
    assert STORED and ReferenceBand.names() == sorted(f"{name}_photos" for name in STORED)


def test_bands_cover_held_back_seeds():
    inside = []
    for name in STORED:
        band, held_back, _ = map(ReferenceBand.load, paths(name))
        assert len(band.records) == 10 and paths(name)[0].stat().st_size < 20_000
        inside += [band.compare(record).inside for record in held_back.records]
    assert sum(inside) >= 0.9 * len(inside)


@pytest.mark.parametrize("name", STORED)
def test_controls_are_outside_the_band(name):
    band, _, controls = map(ReferenceBand.load, paths(name))
    assert not any(band.compare(record).inside for record in controls.records)


@pytest.fixture
def config():
    return yaml.safe_load((CONFIGS / "linear_photos.yaml").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_descent_in_the_eigenbasis_matches_training(config):
    steps = config["trainer"]["max_steps"] = 2000
    descent = linear_record(config, "small", 1)
    model = config["model"]["init_args"]
    encoder = LinearEncoder(**model.pop("encoder")["init_args"], seed=1)
    log = SpectrumLogger(matrices=["cross_correlation"], num_points=NUM_POINTS)
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", callbacks=[log], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(BarlowTwins(encoder, **model), datamodule=FixedCropPairs(**config["data"]["init_args"], seed=1))
    assert torch.equal(descent.steps, log.record.steps)
    torch.testing.assert_close(descent.eigenvalues(), log.record.eigenvalues(), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_linear_reference_runs_are_reproduced(config):
    run, stored = linear_record(config, "small", 3), ReferenceBand.load("linear_photos").records[3]
    torch.testing.assert_close(run.eigenvalues(), stored.eigenvalues(), rtol=2e-3, atol=2e-4)
