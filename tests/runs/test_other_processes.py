"""A run resumed on another number of processes has the same samples, views and losses."""

import csv

import numpy as np
import pytest
import torch
import yaml
from survival import STEPS, job, log_of, newest, run_jobs, write_config, write_images
from test_preemption import DDP, TERM

from stepwise_lightning.errors import EX_TEMPFAIL

KILL = 9
# In float64 two orders of summation differ by 1e-16, which 33 steps of SGD amplify.
TOLERANCE = 1e-9


def write(path, images, **options):
    """Write the configuration of a run in float64, without dropout."""
    write_config(path, images, "VICReg", 0, precision="64-true", **options)
    config = yaml.safe_load(path.read_text())
    config["model"]["init_args"]["encoder"]["init_args"] = {"dropout": 0.0}
    config["trainer"]["callbacks"].insert(0, {"class_path": "survival.Samples"})
    path.write_text(yaml.safe_dump(config))
    return path


def samples(directory):
    """Return the samples of each step on all processes; a repeated step replaces the first."""
    steps = {}
    for path in sorted(directory.glob("samples_*.csv")):
        for step, launch, *pixels in csv.reader(path.read_text().splitlines()):
            steps.setdefault(int(step), {}).setdefault(int(launch), []).extend(pixels)
    return {step: sorted(launches[max(launches)]) for step, launches in steps.items()}


@pytest.mark.parametrize(
    ("moments", "signal"),
    [
        (("backward:11", "backward:22"), TERM),
        (("batch_start:10", "saved:14"), TERM),
        (("backward:11", "batch_start:24"), KILL),
    ],
)
@pytest.mark.slow
def test_resume_on_two_processes_and_on_one_again(moments, signal, tmp_path):
    images = write_images(tmp_path / "images")
    one, two = write(tmp_path / "one.yaml", images), write(tmp_path / "two.yaml", images, **DDP)
    parts = tmp_path / "parts"
    jobs = [
        job(tmp_path / "whole", one),
        job(parts, one, moments[0], signal=signal),
        job(parts, two, moments[1], signal=signal, processes=2),
        job(parts, one),
    ]
    for each, done in zip(jobs, run_jobs(jobs), strict=True):
        expected = (EX_TEMPFAIL if signal == TERM else -KILL) if each["when"] else 0
        assert done["statuses"] == [expected] * each.get("processes", 1), log_of(each)
    log = log_of(jobs[-1], size=10**6)
    assert log.count("the checkpoint is of 1 process(es), this run has 2: samples, views and losses stay the same") == 1
    assert log.count("the checkpoint is of 2 process(es), this run has 1") == 1
    assert samples(parts) == samples(tmp_path / "whole") and len(samples(parts)) == STEPS
    whole, ours = (np.load(newest(folder) / "spectrum.npz") for folder in (tmp_path / "whole", parts))
    assert set(whole) == set(ours)
    for name in whole:
        np.testing.assert_allclose(ours[name], whole[name], rtol=TOLERANCE, atol=TOLERANCE * 1e-3, err_msg=name)
    states = [
        torch.load(newest(f) / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for f in (parts, tmp_path / "whole")
    ]
    for name, weights in states[1].items():
        torch.testing.assert_close(states[0][name], weights, rtol=TOLERANCE, atol=1e-12)


def test_ranks_draw_different_random_numbers():
    """One saved state, three ranks: the first rank continues it, the others are seeded differently."""
    from stepwise_lightning.runs.resume import random_state, restore_randomness

    torch.manual_seed(3)
    states = [random_state()]
    draws = []
    for rank in (0, 1, 2, 1):
        restore_randomness(states, rank, 3)
        draws.append((float(torch.rand(())), float(np.random.rand())))
    torch.manual_seed(3)
    assert draws[0][0] == float(torch.rand(())) and draws[1] == draws[3]
    assert len({torch_ for torch_, _ in draws}) == len({numpy_ for _, numpy_ in draws}) == 3
