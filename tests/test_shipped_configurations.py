"""Every shipped configuration builds and trains."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny_sets import write_cifar10, write_stl10

from stepwise_lightning import TwoViewDataModule
from stepwise_lightning.cli import main
from stepwise_lightning.encoders import Encoder
from stepwise_lightning.spectrum.capture import capture
from stepwise_lightning.spectrum.measures import cross_correlation_eigenvalues

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
LOSSES = ("barlow_twins", "vicreg", "simclr")
# What a machine without GPUs, and a data set of a few images, must have otherwise.
TINY = [
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.num_nodes=1",
    "--trainer.strategy=auto",
    "--trainer.check_val_every_n_epoch=1",
    "--data.init_args.root=data",
    "--data.init_args.global_batch_size=4",
    "--data.init_args.num_probe_pairs=2",
    "--data.init_args.num_workers=0",
]
# Three of these runs keep their ResNet-50, which takes ten seconds.
LARGE = ("simclr_cifar10", "vicreg_stl10_ordinary", "barlow_twins_stl10_multinode")
SMALL_NET = ["--model.init_args.encoder.init_args.backbone=resnet_small"]  # fmt: skip


def load(name: str) -> dict:
    return yaml.safe_load((CONFIGS[0].parent / f"{name}.yaml").read_text(encoding="utf-8"))


def test_there_is_a_configuration_for_every_loss_data_set_and_start():
    expected = {f"{loss}_{data}{start}" for loss in LOSSES for data in ("photos", "cifar10", "stl10")
                for start in ("", "_ordinary")}  # fmt: skip
    assert {path.stem for path in CONFIGS} == expected | {"linear_photos", "barlow_twins_stl10_multinode"}
    assert all(load(path.stem)["trainer"]["logger"]["init_args"]["name"] == path.stem for path in CONFIGS)
    for path in CONFIGS:  # each can be continued, and saves itself some times on the way
        trainer = load(path.stem)["trainer"]
        (saved,) = [c for c in trainer["callbacks"] if c["class_path"] == "stepwise_lightning.LastCheckpoint"]
        assert trainer["max_steps"] >= 5 * saved["init_args"]["every_n_train_steps"]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_trains_two_steps(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--trainer.max_steps=2", "--trainer.log_every_n_steps=1"]
    if "photos" not in config.stem:
        options += TINY + (SMALL_NET if config.stem not in LARGE else [])
        write_cifar10(Path("data"), monkeypatch)
        write_stl10(Path("data"), monkeypatch, train=8)
    monkeypatch.setattr(sys, "argv", ["stepwise", "fit", f"--config={config}", *options])
    main()
    (spectrum,) = tmp_path.glob(f"runs/{config.stem}/version_0/spectrum.csv")
    with spectrum.open(newline="") as file:
        assert {int(row["step"]) for row in csv.DictReader(file)} == {0, 1, 2}
    assert list(spectrum.parent.glob("events.out.tfevents.*")) and (spectrum.parent / "config.yaml").is_file()
    saved = torch.load(spectrum.parent / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2 and list((spectrum.parent / "checkpoints").iterdir()) == [
        spectrum.parent / "checkpoints" / "last.ckpt"
    ]


@pytest.mark.parametrize("name", [f"{loss}_{data}" for loss in LOSSES for data in ("photos", "cifar10", "stl10")])
def test_a_control_differs_in_its_start_alone(name):
    small, ordinary = load(name), load(f"{name}_ordinary")
    starts = [config["model"]["init_args"]["encoder"]["init_args"] for config in (small, ordinary)]
    assert [start.pop("alpha") < 0.01 for start in starts] == [True, False]
    assert [start.pop("bias_norm", None) for start in starts] == [1.0 if "simclr" in name else None, None]
    for config in (small, ordinary):
        config["trainer"]["logger"]["init_args"].pop("name")
    assert small == ordinary


@pytest.mark.parametrize("data", ["cifar10", "stl10"])
def test_learning_rates_on_gpus_fit_the_features_they_start_from(data):
    """8 × rate × largest eigenvalue of the last layer's inputs is in the range that shows steps on the photographs."""
    encoder = Encoder(**load(f"barlow_twins_{data}")["model"]["init_args"]["encoder"]["init_args"])
    images = TwoViewDataModule("photos", "standard", image_size=32, num_probe_pairs=32)
    images.setup("fit")
    hidden = capture(encoder, images.probe_pairs(), ["projector.2"])["projector.2"]
    largest = float(cross_correlation_eigenvalues(*hidden, center=True)[0])
    for loss, least, most in (("barlow_twins", 0.02, 0.2), ("vicreg", 0.01, 0.1), ("simclr", 0.005, 0.05)):
        rate = load(f"{loss}_{data}")["model"]["init_args"]["learning_rate"]
        assert least <= 8 * rate * largest <= most


@pytest.mark.slow
def test_two_processes_log_the_spectra_of_one(tmp_path):
    config = Path(__file__).parent.parent / "configs" / "barlow_twins_photos.yaml"
    command = [sys.executable, "-m", "stepwise_lightning", "fit", f"--config={config}", "--trainer.max_steps=20"]
    for options in ([], ["--trainer.devices=2", "--trainer.strategy=ddp"]):
        subprocess.run([*command, *options], cwd=tmp_path, check=True, capture_output=True, timeout=240)
    one, two = (np.load(tmp_path / f"runs/barlow_twins_photos/version_{v}/spectrum.npz") for v in (0, 1))
    with one, two:
        assert one["step"].tolist() == two["step"].tolist()
        for matrix in ("cross_correlation", "covariance", "encoder.backbone.covariance"):
            # float32 training: round-off, relative to the largest eigenvalue, before growth amplifies it.
            difference = np.abs(one[matrix] - two[matrix]).max(1) / one[matrix].max(1)
            assert difference.max() < 1e-5
