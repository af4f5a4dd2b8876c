"""Full profile on a few images in STL-10's format: the same commands with few steps on a CPU."""

import csv
import json
import os

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny_sets import write_stl10
from torchvision.datasets import STL10

from reproduce.__main__ import main
from reproduce.networks.training import CONFIGS, TrainingRun
from reproduce.networks.variants import LOSS_SETTINGS, VARIANTS

FIGURES = ["resnet_barlow_twins", "three_losses", "standard_init", "hidden_spectra", "cross_loss_alignment",
           "embedding_growth"]  # fmt: skip
ENCODER = "model.init_args.encoder.init_args"
# Required by a machine without GPUs and a small data set.
TINY = {
    "trainer.accelerator": "cpu",
    "trainer.devices": 1,
    "trainer.sync_batchnorm": False,
    "data.init_args.num_workers": 0,
    "data.init_args.global_batch_size": 16,
    "data.init_args.num_probe_pairs": 16,
    # Runs are shorter than the checkpoint interval of the full profile.
    "trainer.callbacks+": "lightning.pytorch.callbacks.ModelCheckpoint",
}
# One run keeps the paper's network for a few steps; the others learn the first modes within seconds.
LARGE = {"trainer.max_steps": 4}
SMALL = {
    "data.init_args.augmentation": "weak",
    f"{ENCODER}.backbone": "resnet_small",
    f"{ENCODER}.hidden_features": 64,
    f"{ENCODER}.out_features": 4,
    "trainer.max_steps": 120,
}
RATES = {"barlow_twins": 0.006, "vicreg": 0.003, "simclr": 0.001}


def shortened(run, settings):
    if run.name == "vicreg_ordinary_seed0":
        return settings | TINY | LARGE
    return settings | TINY | SMALL | {"model.init_args.learning_rate": RATES[run.loss]}


@pytest.mark.slow
def test_network_figures_run_with_the_full_profile(tmp_path, monkeypatch, capfd):
    root = write_stl10(tmp_path / "data", monkeypatch, train=61, test=32, photographs=True)
    # Child processes must accept these files too.
    (tmp_path / "sitecustomize.py").write_text(
        "from torchvision.datasets import STL10\n"
        f"STL10.train_list, STL10.test_list = {STL10.train_list!r}, {STL10.test_list!r}\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    full_settings = TrainingRun.settings
    monkeypatch.setattr(TrainingRun, "settings", lambda run: shortened(run, full_settings(run)))
    out = tmp_path / "results"
    places = ["--root", str(root), "--out", str(out), "--launcher", "env"]  # fresh processes
    status = main([*FIGURES, "--profile", "full", "--seeds", "0", *places])
    printed = capfd.readouterr().err
    # The claims are about longer training and may fail here.
    assert status in (0, 1), printed
    assert not any(word in printed for word in ("error", "Warning", "warning")), printed
    for name in FIGURES:
        document = json.loads((out / name / "claims.json").read_text(encoding="utf-8"))
        assert document["options"]["profile"] == "full" and document["data_set"] == "stl10" and document["claims"]
        with Image.open(out / name / "figure.png") as figure:
            assert figure.size[0] > 1000
        assert (out / name / "figure.pdf").read_bytes().startswith(b"%PDF")
        with (out / name / "data.csv").open(newline="") as file:
            assert len(list(csv.reader(file))) > 10
    assert f"id='{FIGURES[-1]}'" in (out / "report.html").read_text(encoding="utf-8")
    # Three losses from both initialisations, four controls, and two losses with another seed.
    assert len(list((out / "runs").glob("[!.]*"))) == 6 + 4 + 2
    for run in (out / "runs").glob("[!.]*"):
        check_configuration(run)


def check_configuration(run):
    """Compare the configuration of a run with the shipped one: only the shortened settings may differ."""
    loss = next(loss for loss in LOSS_SETTINGS if run.name.startswith(loss))
    variant = run.name.removeprefix(f"{loss}_").rpartition("_")[0]
    expected, used = (
        yaml.safe_load(path.read_text(encoding="utf-8"))
        for path in (CONFIGS / f"{loss}_stl10.yaml", run / "version_0" / "config.yaml")
    )
    seed = int(run.name.rpartition("seed")[2])
    expected["seed_everything"] = seed
    if variant in ("no_off_diagonal", "no_covariance"):
        expected["model"]["init_args"][f"{variant.removeprefix('no_')}_weight"] = 0.0
    expected["data"]["class_path"] = VARIANTS[variant][1].get("data.class_path", expected["data"]["class_path"])
    if variant == "ordinary":
        expected["model"]["init_args"]["encoder"]["init_args"] |= {"alpha": 1.0, "bias_norm": None}
    places = ("root", "save_dir", "name", "learning_rate", "max_steps", "callbacks", "accelerator", "devices",
              "num_workers", "global_batch_size", "sync_batchnorm")  # fmt: skip
    shorter = {key.split(".")[-1] for key in SMALL} if run.name != "vicreg_ordinary_seed0" else set()
    assert not list(differences(expected, used, {*places, *shorter}))
    callbacks = [[callback["class_path"] for callback in config["trainer"]["callbacks"]] for config in (expected, used)]
    assert callbacks[1][: len(callbacks[0])] == callbacks[0]
    with np.load(run / "version_0" / "spectrum.npz") as spectra:
        assert spectra["step"][-1] == used["trainer"]["max_steps"] and np.isfinite(spectra["covariance"]).all()


def differences(expected, used, allowed, path=""):
    """Yield the settings of a configuration that differ in another one."""
    for key, value in expected.items():
        if isinstance(value, dict):
            yield from differences(value, used[key], allowed, f"{path}.{key}")
        elif key not in allowed and value != used[key]:
            yield f"{path}.{key}", value, used[key]
