"""Smoke tests of the benchmarks; `make benchmark` checks the limits on a quiet machine."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from stepwise_lightning import BarlowTwins, LinearEncoder

ROOT = Path(__file__).parent.parent


def run(script, *arguments):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-W", "error::UserWarning", str(ROOT / "benchmarks" / script), *arguments]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode in (0, 1) and not process.stderr, process.stderr
    assert process.returncode == (1 if "MISSED" in process.stdout else 0)
    return process.stdout


@pytest.mark.slow
def test_training():
    printed = run("training.py", "--smoke")
    for name in (
        "our step / plain step",
        "minimal LightningModule / plain step",
        "2048 dimensions",
        "images/s, GPU utilisation",
    ):
        assert name in printed
    assert printed.count("(limit 0.01)") == 2 and printed.count("(limit 0.03)") == 1


@pytest.mark.slow
def test_views():
    printed = run("views.py", "--rounds", "1", "--batches", "2")
    assert printed.count("version 0.1.0") == 2 and "(limit 0.72)" in printed
    assert printed.count("(at least 12.0)") == (2 if find_spec("lightly") else 0)


@pytest.mark.slow
def test_folders():
    printed = run("folders.py", "--images", "1000", "--rounds", "1")
    assert printed.count("(limit ") == 4 and "1000 images" in printed


@pytest.mark.slow
def test_startup():
    printed = run("startup.py", "--rounds", "1")
    assert printed.count("(limit ") == 3 and "a run of two steps, forked / new interpreter: 0." in printed


@pytest.mark.parametrize("num_gpus", [1, 2])
def test_step_costs_of_a_linear_model_follow_from_its_sizes(num_gpus, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from step_costs import step_costs

    n, d, sizes = 32, 4, (300, 600)
    small, large = (
        step_costs(BarlowTwins(LinearEncoder(m, d), 0.1, momentum=0.9), (n, m), num_gpus, "32-true") for m in sizes
    )
    difference = sizes[1] - sizes[0]
    # Each view: W x, and the gradient of W.
    assert large["FLOPs"] - small["FLOPs"] == 2 * 2 * (2 * n * d * difference)
    assert small["weights"] == 3 * 4 * d * sizes[0]
    assert small["weights"] + 2 * 4 * n * sizes[0] <= small["peak"] < 1.5 * (small["weights"] + 2 * 4 * n * sizes[0])
    assert small["traffic"] > small["peak"]


@pytest.mark.slow
def test_step_costs_prints_a_row_for_each_precision():
    assert run("step_costs.py", "simclr_stl10").count("| simclr_stl10 | 1 | 512 |") == 2


@pytest.mark.slow
def test_mixed_precision():
    row = run("mixed_precision.py", "simclr", "--steps", "2", "--modes", "2").splitlines()[-1]
    assert row.startswith("| simclr | 0, 0 | 0, 0 | ")
    recorded, rounded = map(float, row.strip("| ").split(" | ")[-2:])
    assert recorded < 1e-4 and rounded > 20 * recorded  # batch statistics are summed in another order after training
