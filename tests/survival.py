"""Runs that get killed: ``python survival.py '[job, …]'`` trains each job in a fork of its own, one after the other.

A job is ``{"directory": …, "arguments": […], "kill": "moment:step" or null, "kill_after": seconds or null}``; the
arguments are those of ``stepwise``. Printed are the exit statuses, a JSON list, with -9 for a run that was killed.
Forks, because starting Python and importing torch takes longer than these runs.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import lightning as L
import numpy as np
import torch
import yaml
from lightning.pytorch.callbacks import Checkpoint
from PIL import Image
from torch import nn

from stepwise_lightning.cli import main

STEPS, EVERY, BATCHES = 33, 7, 5  # optimiser steps, between two checkpoints, in an epoch
RATES = {"BarlowTwins": 3e-2, "VICReg": 1e-3, "SimCLR": 1e-1}
MOMENTS = ("batch_start", "backward", "batch_end", "saved", "epoch_end", "validation")
IMAGE = 8


class Dropping(nn.Module):
    """An encoder with dropout and batch normalisation: it draws random numbers, and has buffers."""

    def __init__(self) -> None:
        super().__init__()
        features = nn.Sequential(nn.Flatten(), nn.Linear(3 * IMAGE**2, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.backbone = nn.Sequential(features, nn.Dropout(0.2))
        self.projector = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.projector(self.backbone(x))


class Moments(L.Callback):
    """Does something at a moment of a step, which the environment names: ``SURVIVAL=batch_end:7``."""

    def at(self, moment: str, trainer: L.Trainer) -> None:
        if os.environ.get("SURVIVAL") == f"{moment}:{trainer.global_step}" and not trainer.sanity_checking:
            self.act()

    def act(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

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


class LateMoments(Moments, Checkpoint):
    """Comes after what saves checkpoints."""

    def on_train_batch_end(self, trainer, *_):
        self.at("saved", trainer)


def write_images(folder: Path, number: int = 50) -> Path:
    """Write pictures of two classes that differ in colour; a tenth is held out, 45 make five batches of eight."""
    for index in range(number):
        pixels = np.random.default_rng(index).integers(0, 120, (12, 12, 3)) + 100 * np.eye(3)[index % 2]
        path = folder / f"class_{index % 2}" / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


def write_config(path: Path, images: Path, loss: str, workers: int, **trainer) -> Path:
    """Write the configuration of a run with everything that has a state."""
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
        {"class_path": "stepwise_lightning.evaluation.OnlineLinearProbe"},
        {"class_path": "stepwise_lightning.evaluation.OnlineKNN", "init_args": {"k": 5}},
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
    """Return the environment in which the package and this file are found, and one thread is used."""
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"} | more


def run_jobs(jobs: list[dict], timeout: int = 500) -> list[int]:
    """Run jobs, and return their exit statuses."""
    command = [sys.executable, str(Path(__file__)), json.dumps(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=timeout)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _train(job: dict) -> int:
    directory = Path(job["directory"])
    directory.mkdir(parents=True, exist_ok=True)
    os.chdir(directory)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    if job.get("kill"):
        os.environ["SURVIVAL"] = job["kill"]
    if job.get("kill_after"):
        threading.Timer(job["kill_after"], lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    sys.argv = ["stepwise", *job["arguments"]]
    status = 1
    try:
        main()
        status = 0
    except SystemExit as leave:
        if isinstance(leave.code, str):
            print(leave.code, file=sys.stderr)
        else:
            status = leave.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return status


def _fork(job: dict) -> int:
    child = os.fork()
    if child == 0:
        status = 70
        try:
            status = _train(job)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    time.sleep(max(0.0, 1.0 - time.time() % 1))  # the names of event files tell seconds: later ones come later
    return status


if __name__ == "__main__":
    warnings.simplefilter("error")
    for foreign in (r".*treespec, LeafSpec", r"The '\w+_dataloader' does not have many workers", r".*multi-threaded"):
        warnings.filterwarnings("ignore", foreign)
    print(json.dumps([_fork(job) for job in json.loads(sys.argv[1])]))
