"""Commands and settings of docs/clusters.md."""

import csv
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from tiny_runs import stepwise, write_images

from stepwise_lightning.__main__ import main
from stepwise_lightning.losses import barlow_twins_loss

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
SHELL = "".join(re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
COMMANDS = [
    re.split(r" fit |#| &$", line.strip())[1]
    for line in SHELL.splitlines()
    if re.search(r"(bin/stepwise|-m stepwise_lightning) fit ", line)
]


@pytest.mark.parametrize("options", COMMANDS)
def test_training_command_parses(options, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["stepwise", "fit", *shlex.split(options), "--print_config"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert "class_path" in capsys.readouterr().out


def test_monitors_and_checkpoints_log_and_save_two_steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path)
    assert len(BLOCKS) == 2
    for number, block in enumerate(BLOCKS):
        Path(f"{number}.yaml").write_text(block.replace("every_n_train_steps: 1000", "every_n_train_steps: 1"))
    stepwise("fit", "--config=0.yaml", "--config=1.yaml", "--trainer.log_every_n_steps=1")
    (run,) = Path("runs").glob("*/version_0")
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"last.ckpt", "step=1.ckpt", "step=2.ckpt"}
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["train/samples"]) for row in rows if row["train/samples"]] == [4, 8]  # pairs
    (speed,) = (row["train/device/samples_per_sec"] for row in rows if row.get("train/device/samples_per_sec"))
    assert float(speed) > 0 and any("cpu_percent" in name for name in rows[0])


def test_accumulated_loss_is_the_joint_loss_plus_the_variance_of_c():
    z1, z2 = torch.randn(2, 32, 5, dtype=torch.float64)
    settings = {"off_diagonal_weight": 1.0, "normalize": False}

    def c(x, y):
        return (x.T @ y + y.T @ x) / (2 * len(x))

    parts = list(zip(z1.split(8), z2.split(8), strict=True))
    accumulated = torch.stack([barlow_twins_loss(*part, **settings) for part in parts]).mean()
    variance = torch.stack([(c(*part) - c(z1, z2)).square().sum() for part in parts]).mean()
    torch.testing.assert_close(accumulated, barlow_twins_loss(z1, z2, **settings) + variance)
    assert variance > 0.1 * accumulated


def test_precision_of_float32_products_is_an_option(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path)
    try:
        stepwise("fit", "--float32_matmul_precision=high")
        assert torch.get_float32_matmul_precision() == "high"
        (run,) = Path("runs").glob("*/version_0")
        assert yaml.safe_load((run / "config.yaml").read_text())["float32_matmul_precision"] == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
