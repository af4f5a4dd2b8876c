"""The full profile, end to end, on a few images in STL-10's real format: the same commands, a few steps, on a CPU."""

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
from reproduce.networks.variants import METHODS

FIGURES = ["resnet_barlow_twins", "three_losses", "standard_init", "hidden_spectra", "cross_loss_alignment",
           "embedding_growth"]  # fmt: skip
ENCODER = "model.init_args.encoder.init_args"
# What a machine without GPUs, and a data set of a few images, must have otherwise.
TINY = {
    "trainer.accelerator": "cpu",
    "trainer.devices": 1,
    "data.init_args.num_workers": 0,
    "data.init_args.global_batch_size": 16,
    "data.init_args.num_probe_pairs": 16,
    # Runs are shorter than the time between two checkpoints of the full profile.
    "trainer.callbacks+": "lightning.pytorch.callbacks.ModelCheckpoint",
}
# One keeps the network of the paper, for a step or two; in the others the first modes are learned within seconds.
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
def test_all_figures_of_networks_at_full_profile(tmp_path, monkeypatch, capfd):
    root = write_stl10(tmp_path / "data", monkeypatch, train=61, test=32, photographs=True)
    # The commands run in processes of their own, which must believe these files, too.
    (tmp_path / "sitecustomize.py").write_text(
        "from torchvision.datasets import STL10\n"
        f"STL10.train_list, STL10.test_list = {STL10.train_list!r}, {STL10.test_list!r}\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    whole = TrainingRun.settings
    monkeypatch.setattr(TrainingRun, "settings", lambda run: shortened(run, whole(run)))
    out = tmp_path / "results"
    places = ["--root", str(root), "--out", str(out), "--launcher", "env"]  # processes that are started anew
    status = main([*FIGURES, "--profile", "full", "--seeds", "0", *places])
    printed = capfd.readouterr().err
    # Claims are about networks that were trained for longer: they may fail here.
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
    # The three losses from both starts, two of them without what keeps dimensions apart, and three of another seed.
    assert len(list((out / "runs").iterdir())) == 6 + 2 + 3
    for run in (out / "runs").iterdir():
        check_that_it_is_the_full_run(run)


def check_that_it_is_the_full_run(run):
    """Compare its configuration, as run, with the shipped one: only what was shortened may differ."""
    loss = next(loss for loss in METHODS if run.name.startswith(loss))
    variant = run.name.removeprefix(f"{loss}_").rpartition("_")[0]
    asked, used = (
        yaml.safe_load(path.read_text(encoding="utf-8"))
        for path in (CONFIGS / f"{loss}_stl10.yaml", run / "version_0" / "config.yaml")
    )
    seed = int(run.name.rpartition("seed")[2])
    asked["seed_everything"] = asked["data"]["init_args"]["seed"] = seed
    asked["model"]["init_args"]["encoder"]["init_args"]["seed"] = seed
    if variant in ("no_off_diagonal", "no_covariance"):
        asked["model"]["init_args"][f"{variant.removeprefix('no_')}_weight"] = 0.0
    if variant == "ordinary":
        asked["model"]["init_args"]["encoder"]["init_args"] |= {"alpha": 1.0, "bias_norm": None}
    places = ("root", "save_dir", "name", "learning_rate", "max_steps", "callbacks", "accelerator", "devices",
              "num_workers", "global_batch_size")  # fmt: skip
    shorter = {key.split(".")[-1] for key in SMALL} if run.name != "vicreg_ordinary_seed0" else set()
    assert not list(differences(asked, used, {*places, *shorter}))
    callbacks = [[callback["class_path"] for callback in config["trainer"]["callbacks"]] for config in (asked, used)]
    assert callbacks[1][: len(callbacks[0])] == callbacks[0]
    with np.load(run / "version_0" / "spectrum.npz") as spectra:
        assert spectra["step"][-1] == used["trainer"]["max_steps"] and np.isfinite(spectra["covariance"]).all()


def differences(asked, used, allowed, path=""):
    """Yield what was asked for in a configuration and is not so in another."""
    for key, value in asked.items():
        if isinstance(value, dict):
            yield from differences(value, used[key], allowed, f"{path}.{key}")
        elif key not in allowed and value != used[key]:
            yield f"{path}.{key}", value, used[key]
