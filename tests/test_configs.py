"""Every shipped configuration builds and trains."""

import csv
import sys
from pathlib import Path

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
