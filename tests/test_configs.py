"""Every shipped configuration builds and trains."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stepwise_lightning.cli import main

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_trains_two_steps(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--trainer.max_steps=2", "--trainer.log_every_n_steps=1"]
    monkeypatch.setattr(sys, "argv", ["stepwise", "fit", f"--config={config}", *options])
    main()
    (spectrum,) = tmp_path.glob(f"runs/{config.stem}/version_0/spectrum.csv")
    with spectrum.open(newline="") as file:
        assert {int(row["step"]) for row in csv.DictReader(file)} == {0, 1, 2}
    assert list(spectrum.parent.glob("events.out.tfevents.*")) and (spectrum.parent / "config.yaml").is_file()


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
