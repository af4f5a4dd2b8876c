"""Figures that are killed or interrupted, and resumed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FIGURES = ["linear_model", "resnet_barlow_twins", "embedding_growth"]


def command(out):
    return [sys.executable, "-m", "reproduce", *FIGURES, "--profile", "smoke", "--seeds", "0", "1", "--out", str(out)]


def finished(out):
    return {name: (out / name / "claims.json").stat().st_mtime_ns
            for name in FIGURES if (out / name / "claims.json").exists()}  # fmt: skip


def measured(out):
    documents = [json.loads((out / name / "claims.json").read_text(encoding="utf-8")) for name in FIGURES]
    return [claim["measured"] for document in documents for claim in document["claims"]]


@pytest.mark.slow
def test_killed_figures_resume_with_the_same_results(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    subprocess.run(command(whole), env=environment, check=False, capture_output=True, timeout=900)
    draw, kept = random.Random(0), {}
    for seconds in [draw.uniform(4, 40) for _ in range(5)]:
        process = subprocess.Popen(
            command(killed), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)  # training processes save a checkpoint and end
            process.wait()
        assert kept.items() <= finished(killed).items()  # finished figures are not computed again
        kept = finished(killed)
    done = subprocess.run(command(killed), env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    assert kept.items() <= finished(killed).items() and len(finished(killed)) == len(FIGURES)
    assert measured(killed) == measured(whole)
    assert (killed / "report.html").stat().st_size > 100_000
    versions = [path.name for path in (killed / "runs").glob("*/version_*")]
    assert versions == ["version_0"] * 8  # for each seed a run and three controls, none of them trained twice


@pytest.mark.slow
@pytest.mark.parametrize("to_all", [False, True])
@pytest.mark.parametrize("figure", ["linear_model", "resnet_barlow_twins"])
def test_ctrl_c_ends_a_figure_with_one_line_and_saves_training(figure, to_all, tmp_path):
    """A terminal sends SIGINT to all processes; another program may send it to one."""
    command = [sys.executable, "-m", "reproduce", figure, "--seeds", "0", "1", "--out", str(tmp_path / "out")]
    begun = 2 if figure == "resnet_barlow_twins" else 0
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 600
        while (
            "0 of " not in (tmp_path / "log.txt").read_text()
            or len(list(tmp_path.glob("out/runs/*/version_0/checkpoints"))) < begun
        ):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(1 if begun else 8)  # until the processes compute
        (os.killpg if to_all else os.kill)(process.pid, signal.SIGINT)
        assert process.wait(120) == 130
        assert len(list(tmp_path.glob("out/runs/*/version_0/checkpoints/last.ckpt"))) == begun
        output = (tmp_path / "log.txt").read_text()
        assert "Traceback" not in output
        assert output.splitlines()[-1] == "interrupted: finished results are kept; continue with --resume"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
