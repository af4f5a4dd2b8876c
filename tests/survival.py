"""Training runs that are interrupted by a signal or a full disk, each job in forked processes, one after the other.

A job is a dictionary with

- ``directory``: working directory, and ``arguments`` of ``stepwise``;
- ``when``: time of the interruption, ``moment:step``, or None; ``signal``: its number, by default SIGKILL; ``ranks``:
  ranks that receive it, by default all; ``disk``: instead of a signal, ``full`` fills the disk and ``limit`` limits the
  size of files;
- ``processes``: number of ranks, by default one;
- ``patience``: seconds until ranks that still run are killed.

The outcome of a job is ``{"statuses": exit status of each rank, "seconds": from the signal to the end of the last
rank}``. A status is −n after signal n and None for a rank that was killed because it did not end.
"""

import os
import resource
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import lightning as L
import numpy as np
import torch
import yaml
from fresh_processes import server
from lightning.pytorch.callbacks import Checkpoint
from PIL import Image
from torch import nn

from stepwise_lightning.__main__ import main

STEPS, EVERY, BATCHES = 33, 7, 5  # optimizer steps per run, per checkpoint and per epoch
RATES = {"BarlowTwins": 3e-2, "VICReg": 1e-3, "SimCLR": 1e-1}
IMAGE = 8
PATIENCE = 60  # seconds until a rank that still runs counts as hanging


class Dropping(nn.Module):
    """Encoder with dropout and batch normalization, which has random numbers and buffers."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        features = nn.Sequential(nn.Flatten(), nn.Linear(3 * IMAGE**2, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.backbone = nn.Sequential(features, nn.Dropout(dropout))
        self.projector = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.projector(self.backbone(x))


class Moments(L.Callback):
    """Sends the signal or fills the disk at the moment in the environment, such as ``batch_end:7``."""

    def at(self, moment: str, trainer: L.Trainer) -> None:
        if os.environ.get("SURVIVAL_WHEN") == f"{moment}:{trainer.global_step}" and not trainer.sanity_checking:
            if disk := os.environ.get("SURVIVAL_DISK"):
                fill_up(disk)
            else:
                Path("signalled").write_text(str(time.time()))
                os.kill(os.getpid(), int(os.environ["SURVIVAL_SIGNAL"]))

    def on_train_batch_start(self, trainer, *_):
        self.at("batch_start", trainer)

    def on_after_backward(self, trainer, *_):
        self.at("backward", trainer)

    def on_train_batch_end(self, trainer, *_):
        self.at("batch_end", trainer)

    def on_train_epoch_end(self, trainer, *_):
        self.at("epoch_end", trainer)

    def on_validation_batch_end(self, trainer, *_):
        self.at("validation", trainer)


class Samples(L.Callback):
    """Records the samples of each step and the launch in ``samples_RANK.csv``."""

    def on_train_start(self, trainer, *_):
        self.file = Path(f"samples_{trainer.global_rank}.csv")
        self.launch = time.time_ns()
        self.launch = trainer.strategy.broadcast(self.launch)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        digests = (f"{view.double().sum():.9f}" for views in batch[:2] for view in views)
        with self.file.open("a") as file:
            print(trainer.global_step, self.launch, *digests, sep=",", file=file)


def fill_up(disk: str) -> None:
    """Fill the disk, or limit the size of files to 1 KiB."""
    if disk == "full":
        free = os.statvfs(".")
        Path("ballast").write_bytes(bytes(free.f_bavail * free.f_frsize))
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))


class LateMoments(Moments, Checkpoint):
    """Runs after the callbacks that save checkpoints."""

    def on_train_batch_end(self, trainer, *_):
        self.at("saved", trainer)


def write_images(folder: Path, number: int = 50) -> Path:
    """Write images of two classes that differ in color; a tenth is held out, 45 make five batches of eight."""
    for index in range(number):
        pixels = np.random.default_rng(index).integers(0, 120, (12, 12, 3)) + 100 * np.eye(3)[index % 2]
        path = folder / f"class_{index % 2}" / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


def write_config(path: Path, images: Path, loss: str, workers: int, **trainer) -> Path:
    """Write a configuration with a schedule, momentum, probes and every callback that has a state."""
    model = {
        "encoder": {"class_path": "survival.Dropping"}, "learning_rate": RATES[loss], "momentum": 0.9,
        "warmup_steps": 5, "cosine": True,
    }  # fmt: skip
    data = {
        "data": str(images), "augmentation": "standard", "image_size": IMAGE, "global_batch_size": 8,
        "num_probe_pairs": 5, "num_workers": workers,
    }  # fmt: skip
    spectra = {"watch": ["encoder.backbone"], "num_points": 25, "keep_embeddings": True}
    callbacks = [
        {"class_path": "survival.Moments"},
        {"class_path": "stepwise_lightning.SpectrumLogger", "init_args": spectra},
        {"class_path": "stepwise_lightning.callbacks.online_evaluation.OnlineLinearProbe"},
        {"class_path": "stepwise_lightning.callbacks.online_evaluation.OnlineKNN", "init_args": {"k": 5}},
        {"class_path": "stepwise_lightning.LastCheckpoint", "init_args": {"every_n_train_steps": EVERY}},
        {"class_path": "survival.LateMoments"},
    ]
    logger = {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": "runs", "name": "run", "default_hp_metric": False},
    }
    config = {
        "seed_everything": 0,
        "model": {"class_path": f"stepwise_lightning.{loss}", "init_args": model},
        "data": {"class_path": "stepwise_lightning.TwoViewDataModule", "init_args": data},
        "trainer": {
            "max_steps": STEPS, "accelerator": "cpu", "deterministic": True, "log_every_n_steps": 2,
            "check_val_every_n_epoch": 2, "enable_progress_bar": False, "enable_model_summary": False,
            "logger": logger, "callbacks": callbacks, **trainer,
        },
    }  # fmt: skip
    path.write_text(yaml.safe_dump(config))
    return path


def environment(**more: str) -> dict[str, str]:
    """Return an environment with one thread, in which the package and this module can be imported."""
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"} | more


def job(directory: Path, config: Path, when: str | None = None, **more) -> dict:
    """Return a job that resumes the newest run of the directory, as a requeued job does."""
    arguments = ["fit", f"--config={config}", "--ckpt_path=last"]
    return {"directory": str(directory), "arguments": arguments, "when": when} | more


def newest(directory: Path) -> Path:
    """Return the folder of the newest run."""
    return max((directory / "runs/run").glob("version_*"), key=lambda path: int(path.name.removeprefix("version_")))


def log_of(job: dict, rank: int = 0, size: int = 3000) -> str:
    """Return the end of the output of a rank, of all jobs in this directory."""
    return Path(job["directory"], f"log_{rank}.txt").read_text()[-size:]


def run_jobs(jobs: list[dict], timeout: int = 900) -> list[dict]:
    """Run jobs and return their outcomes."""
    return server().run(_run_all, jobs, timeout=timeout)


def _run_all(jobs: list[dict]) -> list[dict]:
    return [_run(job) for job in jobs]


def _train(job: dict, rank: int, port: int) -> int:
    directory = Path(job["directory"])
    directory.mkdir(parents=True, exist_ok=True)
    os.chdir(directory)
    log = os.open(f"log_{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    if job.get("when") and rank in job.get("ranks", [rank]):
        number = str(job.get("signal", signal.SIGKILL.value))
        os.environ |= {"SURVIVAL_WHEN": job["when"], "SURVIVAL_SIGNAL": number, "SURVIVAL_DISK": job.get("disk", "")}
    if (processes := job.get("processes", 1)) > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
        os.environ["WORLD_SIZE"] = str(processes)
    sys.argv = ["stepwise", *job["arguments"]]
    try:
        main()
        return 0
    except SystemExit as leave:
        if isinstance(leave.code, str):
            print(leave.code, file=sys.stderr)
            return 1
        return leave.code or 0
    except BaseException:
        traceback.print_exc()
        return 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _run(job: dict) -> dict:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = {}
    for rank in range(job.get("processes", 1)):
        if not (child := os.fork()):
            os._exit(_train(job, rank, port))
        children[child] = rank
    statuses: list[int | None] = [None] * len(children)
    ended, deadline, stopped = 0.0, time.time() + job.get("patience", PATIENCE), False
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            rank = children.pop(child)
            if not stopped:
                statuses[rank], ended = os.waitstatus_to_exitcode(status), time.time()
        elif time.time() > deadline and not stopped:
            stopped = True
            for each in children:
                os.kill(each, signal.SIGKILL)
        else:
            time.sleep(0.02)
    Path(job["directory"], "ballast").unlink(missing_ok=True)
    signalled = Path(job["directory"], "signalled")
    seconds = ended - float(signalled.read_text()) if signalled.exists() else None
    signalled.unlink(missing_ok=True)
    time.sleep(1 - time.time() % 1)  # the names of event files contain the second; keep their order
    return {"statuses": statuses, "seconds": seconds}
