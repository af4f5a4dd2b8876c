"""Smoke tests of the benchmarks; `make benchmark` checks the limits on a quiet machine."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

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
