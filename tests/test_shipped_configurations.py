"""Shipped configurations build and train, alone and with overlays."""

import csv
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from fresh_processes import stepwise
from lightning.pytorch.cli import LightningCLI
from tiny_sets import fill, write_cifar10, write_stl10

from stepwise_lightning import SpectrumLogger, TwoViewDataModule
from stepwise_lightning.__main__ import main
from stepwise_lightning.encoders import Encoder
from stepwise_lightning.features import capture
from stepwise_lightning.spectrum import cross_correlation_eigenvalues

CONFIGS = Path(__file__).parent.parent / "configs"
LOSSES, DATA_SETS = ("barlow_twins", "vicreg", "simclr"), ("photos", "cifar10", "cifar10_cpu", "stl10", "imagenet")
NETWORKS = [f"{loss}_{data}" for loss in LOSSES for data in DATA_SETS]
COMPLETE = [*NETWORKS, "spectral_contrastive_photos", "spectral_contrastive_cifar10_cpu", "linear_photos"]
# Every loss, data set and encoder once; the slow suite tests all.
USUAL = {"barlow_twins_photos", "simclr_cifar10_cpu", "vicreg_stl10", "barlow_twins_imagenet", "linear_photos"}
# The linear model has no last layer whose initialization could be ordinary.
OVERLAYS = {"ordinary": NETWORKS, "two_nodes": COMPLETE}
ENCODER, LOGGER = "model.init_args.encoder.init_args", "trainer.logger.init_args"
START = {f"{ENCODER}.alpha": 1.0, f"{LOGGER}.save_dir": "runs/ordinary"}
DDP = {
    "trainer.strategy.class_path": "lightning.pytorch.strategies.DDPStrategy",
    "trainer.strategy.init_args.gradient_as_bucket_view": True,
    "trainer.strategy.init_args.broadcast_buffers": False,
}
NODES = {"trainer.num_nodes": 2, "trainer.devices": 4} | DDP
COMPOSED = [(name, overlay) for overlay, names in OVERLAYS.items() for name in names]


# Settings for a machine without GPUs and a data set of a few images.
TINY = [
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.strategy=auto",
    "--trainer.check_val_every_n_epoch=1",
    "--data.init_args.global_batch_size=4",
    "--data.init_args.num_probe_pairs=2",
    "--data.init_args.num_workers=0",
]
SMALL_NET = ["--model.init_args.encoder.init_args.backbone=resnet_small"]
# The forecast of 2048 hidden features takes seconds.
NARROW = [*SMALL_NET, "--model.init_args.encoder.init_args.hidden_features=64"]


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))


def given(*names: str) -> list[str]:
    return [f"--config={CONFIGS / f'{name}.yaml'}" for name in names]


def flat(config: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Return the values of nested keys by dotted keys."""
    values: dict[str, Any] = {}
    for key, value in config.items():
        nested = isinstance(value, dict) and value
        values |= flat(value, f"{above}{key}.") if nested else {f"{above}{key}": value}
    return values


def test_every_loss_and_data_set_has_a_configuration():
    assert {path.stem for path in CONFIGS.iterdir()} == {*COMPLETE, *OVERLAYS}
    for name in COMPLETE:  # each saves several checkpoints
        trainer = load(name)["trainer"]
        assert trainer["logger"]["init_args"]["name"] == name
        (saving,) = [c for c in trainer["callbacks"] if c["class_path"] == "stepwise_lightning.LastCheckpoint"]
        assert trainer["max_steps"] >= 5 * saving["init_args"]["every_n_train_steps"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in USUAL else pytest.mark.slow) for name in COMPLETE]
)
def test_configuration_trains_two_steps(name, tmp_path, monkeypatch):
    smaller = NARROW if "photos" not in name else []
    smaller = [*smaller, "--data.init_args.image_size=64"] if "imagenet" in name else smaller
    run = two_steps(name, [name], tmp_path / "runs", tmp_path, monkeypatch, *smaller)
    with (run / "spectrum.csv").open(newline="") as file:
        assert {int(row["step"]) for row in csv.DictReader(file)} == {0, 1, 2}
    assert list(run.glob("events.out.tfevents.*")) and (run / "config.yaml").is_file()
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in COMPLETE if "photos" not in name])
def test_configuration_trains_its_full_network(name, tmp_path, monkeypatch):
    two_steps(name, [name], tmp_path / "runs", tmp_path, monkeypatch)


@pytest.mark.slow
def test_control_trains_in_a_separate_folder(tmp_path, monkeypatch):
    two_steps("simclr_photos", ["simclr_photos", "ordinary"], tmp_path / "runs" / "ordinary", tmp_path, monkeypatch)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["ordinary"]


def two_steps(
    name: str, configs: list[str], logs: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *others: str
) -> Path:
    """Train two steps and return the folder of the run, the only one in ``logs``."""
    monkeypatch.chdir(folder)
    options = ["--trainer.max_steps=2", "--trainer.log_every_n_steps=1", *others]
    options += ["--trainer.callbacks+=stepwise_lightning.PlateauMonitor"]  # a warning fails the test
    if "photos" not in name:
        options += TINY
        if "imagenet" in name:
            for seed, folder in enumerate(("train/a", "train/b", "val/a", "val/b")):
                fill(Path("data/imagenet", folder), 3, seed, size=(64, 64))
        else:
            write_cifar10(Path("data"), monkeypatch)
            write_stl10(Path("data"), monkeypatch, train=8)
    monkeypatch.setattr(sys, "argv", ["stepwise", "fit", *given(*configs), *options])
    main()
    (run,) = logs.glob("*/version_*")
    assert run == logs / name / "version_0"
    return run


# By default, the configurations that test_configuration_trains_two_steps does not build, and each overlay once.
BUILT = [(name,) for name in COMPLETE if name not in USUAL]
BUILT += [("barlow_twins_photos", "ordinary"), ("vicreg_stl10", "two_nodes")]


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(case, marks=() if case in BUILT else pytest.mark.slow)
        for case in [*((name,) for name in COMPLETE), *COMPOSED]
    ],
    ids="+".join,
)
def test_configuration_builds_its_objects(names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [*given(*names), "--trainer.accelerator=cpu", *([] if names[0] == "linear_photos" else SMALL_NET)]
    monkeypatch.setattr(sys, "argv", ["stepwise", *options])
    # Not run: the tests have one machine.
    built = LightningCLI(
        L.LightningModule,
        L.LightningDataModule,
        save_config_callback=None,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        run=False,
    )
    assert type(built.model).__name__ == load(names[0])["model"]["class_path"].rpartition(".")[2]
    assert type(built.datamodule).__name__ == load(names[0])["data"]["class_path"].rpartition(".")[2]
    assert sum(isinstance(callback, SpectrumLogger) for callback in built.trainer.callbacks) == 1
    assert built.trainer.logger.save_dir == ("runs/ordinary" if "ordinary" in names else "runs")
    assert built.trainer.num_nodes == (2 if "two_nodes" in names else 1)
    if "two_nodes" in names:
        assert built.trainer.world_size == 8
        assert load(names[0])["data"]["init_args"].get("global_batch_size", 8) % 8 == 0


def test_overlay_files_have_only_their_settings():
    assert flat(load("ordinary")) == START | {f"{ENCODER}.bias_norm": None}
    assert flat(load("two_nodes")) == NODES


# One case per overlay and change.
FEW = [("barlow_twins_photos", "ordinary"), ("simclr_photos", "ordinary"), ("vicreg_stl10", "two_nodes")]


@pytest.mark.parametrize(
    "names", [pytest.param(case, marks=() if case in FEW else pytest.mark.slow) for case in COMPOSED], ids="+".join
)
def test_overlay_changes_only_its_settings(names, monkeypatch, capsys):
    name, overlay = names
    before, after = (flat(complete(files, monkeypatch, capsys)) for files in ([name], names))
    changes = {key: after.get(key) for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    if overlay == "ordinary":
        assert before[f"{ENCODER}.alpha"] < 0.01
        assert changes == START | ({f"{ENCODER}.bias_norm": None} if "simclr" in name else {})
    else:
        others = {key: value for key, value in changes.items() if not key.startswith("trainer.strategy")}
        assert others == {"trainer.num_nodes": 2, "trainer.devices": 4} and after.items() >= NODES.items()


def test_overlays_combine(monkeypatch, capsys):
    before, after = (
        flat(complete(names, monkeypatch, capsys))
        for names in (["barlow_twins_stl10"], ["barlow_twins_stl10", "ordinary", "two_nodes"])
    )
    assert after == before | START | NODES


def test_gpu_configurations_share_precision_and_strategy():
    shared = {"trainer.precision": "bf16-mixed", "trainer.benchmark": True, "trainer.sync_batchnorm": True} | DDP
    for name in COMPLETE:
        settings = flat(load(name))
        assert (settings.items() >= shared.items()) == (settings["trainer.accelerator"] == "gpu"), name


@pytest.mark.slow
def test_strategy_of_gpu_configurations_trains_on_one_device(processes, tmp_path, monkeypatch):
    """In a process group of one process."""
    monkeypatch.chdir(tmp_path)
    for seed, folder in enumerate(("images/a", "images/b")):
        fill(Path(folder), 10, seed)
    config = {"trainer": {"strategy": load("vicreg_stl10")["trainer"]["strategy"], "devices": 1, "max_steps": 2}}
    config["trainer"]["log_every_n_steps"] = 1
    config["data"] = {"init_args": {"data": "images", "global_batch_size": 4, "num_probe_pairs": 2}}
    options = [f"--{name}={value}" for name, value in flat(config).items()]
    processes.run(stepwise, "fit", *given("vicreg_photos"), *options)
    assert torch.load("runs/vicreg_photos/version_0/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


def complete(
    names: Sequence[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> dict[str, Any]:
    """Return the complete configuration of the command line, with defaults, for some files."""
    monkeypatch.setattr(sys, "argv", ["stepwise", "fit", *given(*names), "--print_config"])
    with pytest.raises(SystemExit, match="0"):
        main()
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("data", ["cifar10", "stl10"])
def test_learning_rates_on_gpus_are_below_the_stability_limit(data):
    """8 × rate × largest eigenvalue of the last layer's inputs is far below the limit, 1.4 for half of all seeds."""
    encoder = Encoder(**load(f"barlow_twins_{data}")["model"]["init_args"]["encoder"]["init_args"])
    images = TwoViewDataModule("photos", "standard", image_size=32, num_probe_pairs=32)
    images.setup("fit")
    hidden = capture(encoder, images.probe_pairs(), ["projector.2"])["projector.2"]
    largest = float(cross_correlation_eigenvalues(*hidden, center=True)[0])
    for loss, least, most in (("barlow_twins", 0.02, 0.4), ("vicreg", 0.01, 0.4), ("simclr", 0.005, 0.2)):
        rate = load(f"{loss}_{data}")["model"]["init_args"]["learning_rate"]
        assert least <= 8 * rate * largest <= most


@pytest.mark.slow
def test_two_processes_log_the_spectra_of_one_process_once(tmp_path):
    fit = [sys.executable, "-m", "stepwise_lightning", "fit"]
    command = [*fit, *given("barlow_twins_photos"), "--trainer.max_steps=20"]
    for options in ([], ["--trainer.devices=2", "--trainer.strategy=ddp"]):
        done = subprocess.run(
            [*command, *options], cwd=tmp_path, check=True, capture_output=True, timeout=900, text=True
        )
        for line in ("writes to", "run ", "found ", "picture ", "forecast: 0 of 10 modes learned"):
            assert [text.startswith(line) for text in done.stdout.splitlines()].count(True) == 1, line
    one, two = (np.load(tmp_path / f"runs/barlow_twins_photos/version_{v}/spectrum.npz") for v in (0, 1))
    with one, two:
        assert one["step"].tolist() == two["step"].tolist()
        for matrix in ("cross_correlation", "covariance", "encoder.backbone.covariance"):
            # float32 training: round-off, relative to the largest eigenvalue, before growth amplifies it.
            difference = np.abs(one[matrix] - two[matrix]).max(1) / one[matrix].max(1)
            assert difference.max() < 5e-5
