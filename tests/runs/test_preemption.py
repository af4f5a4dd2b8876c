"""Signals save and stop a run, which resumes exactly; a lost process stops the others."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from same_runs import assert_same_run
from survival import environment, job, log_of, newest, run_jobs, write_config, write_images

from stepwise_lightning.errors import EX_TEMPFAIL

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGSTOP)
INT, TERM, USR1, STOP = (int(number) for number in SIGNALS)
TIMEOUT = 15


def ddp(timeout):
    """Return the Trainer settings of two processes with a timeout ``h:mm:ss``."""
    return {
        "devices": 2,
        "strategy": {
            "class_path": "lightning.pytorch.strategies.DDPStrategy",
            "init_args": {"timeout": timeout, "process_group_backend": "gloo"},
        },
        "plugins": [{"class_path": "stepwise_lightning.sync_batchnorm.SyncBatchNorm"}],
    }


DDP = ddp("0:05:00")  # long enough for a busy machine
SECONDS = 20  # docs/failures.md has measured times


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def saved_step(directory):
    return torch.load(newest(directory) / "checkpoints/last.ckpt", weights_only=True)["global_step"]


def stop_and_continue(directory, images, loss, stops, **options):
    """Compare an uninterrupted run with runs that are stopped by a signal and resumed."""
    directory.mkdir()
    processes = options.get("devices", 1)
    config = write_config(directory / "config.yaml", images, loss, 0, **options)
    jobs = [job(directory / "whole", config, processes=processes)]
    for name, (when, number, ranks) in stops.items():
        jobs.append(job(directory / name, config, when, signal=number, ranks=ranks, processes=processes))
        jobs.append(job(directory / name, config, processes=processes))
    for each, done in zip(jobs, run_jobs(jobs), strict=True):
        status = EX_TEMPFAIL if each["when"] else 0
        assert done["statuses"] == [status] * processes, (each, [log_of(each, rank) for rank in range(processes)])
        assert done["seconds"] is None or done["seconds"] < SECONDS
    for name in stops:
        assert_same_run(newest(directory / name), newest(directory / "whole"))


def test_signal_saves_and_the_same_command_resumes(images, tmp_path):
    stop_and_continue(tmp_path / "runs", images, "SimCLR", {"term": ("backward:16", TERM, [0])})
    log = log_of({"directory": tmp_path / "runs" / "term"})
    assert "stopped by a signal: saved at step 17; the same command with --ckpt_path last resumes" in log
    assert "version_0 from step 17" in log and "Traceback" not in log


@pytest.mark.slow
def test_signal_to_the_second_process_stops_both(images, tmp_path):
    stop_and_continue(tmp_path / "runs", images, "VICReg", {"second": ("backward:11", USR1, [1])}, **DDP)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["BarlowTwins", "VICReg", "SimCLR"])
def test_every_signal_to_every_process(loss, images, tmp_path):
    """Including the last step of an epoch, which validation and one more step follow."""
    alone = {"usr1": ("batch_start:19", USR1, [0]), "term": ("validation:10", TERM, [0])}
    alone |= {"ctrl_c": ("saved:16", INT, [0])}
    stop_and_continue(tmp_path / "one", images, loss, alone)
    two = {"first": ("backward:11", TERM, [0]), "both": ("backward:19", USR1, [0, 1]), "second": ("saved:7", TERM, [1])}
    stop_and_continue(tmp_path / "two", images, loss, two, **DDP)


def started(directory, config, *options):
    """Start ``stepwise`` in a new process group, as a scheduler does, and wait for its first checkpoint."""
    command = [sys.executable, "-m", "stepwise_lightning", "fit", f"--config={config}", "--ckpt_path=last", *options]
    directory.mkdir()
    with (directory / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command, cwd=directory, env=environment(), stdout=log, stderr=log, start_new_session=True
        )
    deadline = time.monotonic() + 120
    while not list(directory.glob("runs/run/version_0/checkpoints/last.ckpt")):
        assert process.poll() is None and time.monotonic() < deadline, (directory / "log.txt").read_text()
        time.sleep(0.05)
    return process


@pytest.mark.parametrize(
    ("number", "to_all"),
    [
        pytest.param(TERM, False, id="first process"),
        pytest.param(TERM, True, id="all processes"),
        pytest.param(INT, True, id="Ctrl-C, to all processes"),
    ],
)
@pytest.mark.slow
def test_signal_from_a_scheduler(number, to_all, images, tmp_path):
    """Lightning starts the second process; signals also reach the processes that load data."""
    workers, more = (2, {}) if to_all else (0, DDP)
    config = write_config(tmp_path / "config.yaml", images, "BarlowTwins", workers, **more)
    process = started(tmp_path / "run", config, "--trainer.max_steps=100000")
    try:
        (os.killpg if to_all else os.kill)(process.pid, number)
        assert process.wait(SECONDS) == EX_TEMPFAIL, (tmp_path / "run/log.txt").read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert saved_step(tmp_path / "run") > 0


@pytest.mark.slow
def test_killed_process_stops_the_other_with_one_line(images, tmp_path):
    config = write_config(tmp_path / "config.yaml", images, "VICReg", 0, **DDP)
    jobs = [job(tmp_path / f"{rank}", config, "backward:16", ranks=[rank], processes=2) for rank in (0, 1)]
    for rank, done in enumerate(run_jobs(jobs)):
        assert done["statuses"][rank] == -9 and done["statuses"][1 - rank] == 1, (done, log_of(jobs[rank], 1 - rank))
        assert done["seconds"] < SECONDS
        last = log_of(jobs[rank], 1 - rank).strip().splitlines()[-1]
        assert last.startswith("stepwise: error: another process of this run has ended or does not answer")
        assert saved_step(tmp_path / str(rank)) == 14


@pytest.mark.slow
def test_stopped_process_stops_the_other_within_the_timeout(images, tmp_path):
    """A collective call of Lightning may hide the first error; the next one has another message."""
    config = write_config(tmp_path / "config.yaml", images, "VICReg", 0, **ddp(f"0:00:{TIMEOUT}"))
    stops = [(when, rank) for when in ("backward:16", "saved:16") for rank in (0, 1)]
    jobs = [
        job(tmp_path / f"{number}", config, when, signal=STOP, ranks=[rank], processes=2, patience=3 * TIMEOUT)
        for number, (when, rank) in enumerate(stops)
    ]
    for each, done in zip(jobs, run_jobs(jobs), strict=True):
        (rank,) = each["ranks"]
        assert (done["statuses"][rank], done["statuses"][1 - rank]) == (None, 1), log_of(each, 1 - rank)
        assert "another process of this run has ended or does not answer" in log_of(each, 1 - rank)
        assert TIMEOUT - 1 < done["seconds"] < TIMEOUT + SECONDS / 2
