"""Train one network with the ``stepwise fit`` command, and resume interrupted training."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any
from zipfile import ZipFile

import torch
import yaml

from reproduce.networks.variants import ALL_LOSS_SETTINGS, CPU_STEPS, RATE_FACTORS, VARIANTS
from reproduce.processes import ForkedProcess
from stepwise_lightning import TwoViewDataModule
from stepwise_lightning.errors import EX_TEMPFAIL, UserError
from stepwise_lightning.files import atomic_write_text
from stepwise_lightning.runs.folders import checkpoints_in

CONFIGS = Path(__file__).parents[2] / "configs"
# cpu: the shipped configuration; smoke: a size for tests; full: the paper's size.
PROFILES: dict[str, dict[str, Any]] = {"smoke": {}, "cpu": {}, "full": {"data": "stl10"}}
# Between cpu and full: 12 to 32 hours of one CPU core for three seeds, used by one figure only; and its size for tests.
MIDDLE_PROFILES: dict[str, dict[str, Any]] = {
    "middle": {"data": "cifar10", "labelled": 5000, "held_out": 1000}, "tiny": {"labelled": 60, "held_out": 30},
}  # fmt: skip
_CONFIGURATION = {
    "smoke": "photos", "cpu": "photos", "middle": "cifar10_cpu", "tiny": "cifar10_cpu", "full": "stl10"
}  # fmt: skip
_TINY = {
    "model.init_args.encoder.init_args.out_features": 4, "model.init_args.encoder.init_args.hidden_features": 16,
    "model.init_args.encoder.init_args.width": 4, "model.init_args.learning_rate": 0.01,
    "data.init_args.image_size": 8, "data.init_args.global_batch_size": 16, "data.init_args.num_probe_pairs": 16,
    "trainer.max_steps": 60,
}  # fmt: skip
_MODULE = "stepwise_lightning"
_PLACES = (
    "data.init_args.root", "trainer.logger.init_args.save_dir", "trainer.default_root_dir", "trainer.callbacks.dirpath"
)  # fmt: skip
WEIGHTS_INTERVAL = 40  # training steps between the saved weights of a short run from small initialisation


class RunFailedError(RuntimeError, UserError):
    """Training failed; the message ends with its last line of output."""


class RunDivergedError(RunFailedError):
    """The loss or a weight was not finite."""


class TrainingRun:
    """One training run, identified by loss, variant, seed and options, and executed at most once."""

    def __init__(self, loss: str, variant: str, seed: int, options: argparse.Namespace) -> None:
        self.loss, self.variant, self.seed, self.options = loss, variant, seed, options
        self.name = f"{loss}_{variant}_seed{seed}"
        self.logs = Path(options.out) / "runs"
        self.directory = self.logs / self.name / "version_0"
        self.weights = self.logs / self.name / "weights"
        self.launcher = shlex.split(options.launcher)
        overlays, self._variant = VARIANTS[variant]
        self.configs = [CONFIGS / name for name in (f"{loss}_{_CONFIGURATION[options.profile]}.yaml", *overlays)]
        self._process: subprocess.Popen[bytes] | ForkedProcess | None = None

    def settings(self) -> dict[str, Any]:
        """Return the command-line settings that override the configuration files."""
        settings: dict[str, Any] = {
            "seed_everything": self.seed,
            "data.init_args.data": self.options.data,
            "data.init_args.root": self.options.root,
            "trainer.logger.init_args.save_dir": str(self.logs),
            "trainer.logger.init_args.name": self.name,
            # Lightning saves here when SLURM warns it; parallel jobs must not find each other's checkpoints.
            "trainer.default_root_dir": str(self.logs / self.name),
            "trainer.enable_progress_bar": "false",
        } | self._variant
        settings |= self._weights_settings()
        profile = self.options.profile
        is_control = self.variant == ALL_LOSS_SETTINGS[self.loss].control
        if profile == "cpu" and self.variant in CPU_STEPS and not is_control:
            settings["trainer.max_steps"] = CPU_STEPS[self.variant]
        settings |= _TINY if self.options.profile == "tiny" else {}
        if self.options.profile == "smoke":
            settings |= {
                "model.init_args.encoder.init_args.out_features": 4,
                "model.init_args.learning_rate": ALL_LOSS_SETTINGS[self.loss].smoke_learning_rate,
                "model.init_args.momentum": 0.9,
                "data.init_args.global_batch_size": 32,
                "data.init_args.num_probe_pairs": 64,
                "trainer.max_steps": 300,
            }
            if self.variant == "noise_safe_rate":  # small batches fluctuate more
                settings["trainer.callbacks.share"] = 0.5
        if self.variant in RATE_FACTORS:
            model = yaml.safe_load(self.configs[0].read_text(encoding="utf-8"))["model"]
            rate = settings.get("model.init_args.learning_rate", model["init_args"]["learning_rate"])
            settings["model.init_args.learning_rate"] = RATE_FACTORS[self.variant] * rate
        return settings

    def _weights_settings(self) -> dict[str, Any]:
        """Return the settings of the callback that saves weights during training."""
        profile = self.options.profile  # a file of the full profile has 110 MB
        if profile in MIDDLE_PROFILES or (self.variant == "small" and profile == "full"):
            return {
                "trainer.callbacks+": "reproduce.networks.weights.LogSpacedWeights",
                "trainer.callbacks.dirpath": str(self.weights),
            }
        if self.variant != "small":
            return {}
        return {
            "trainer.callbacks+": "lightning.pytorch.callbacks.ModelCheckpoint",
            "trainer.callbacks.dirpath": str(self.weights),
            "trainer.callbacks.filename": "{step}",
            "trainer.callbacks.every_n_train_steps": WEIGHTS_INTERVAL,
            "trainer.callbacks.save_top_k": -1,
            "trainer.callbacks.save_weights_only": "true",
        }

    def num_images(self) -> tuple[int, int]:
        """Return the numbers of training and held-out images that this run needs: a batch and the probe pairs."""
        sections = [yaml.safe_load(path.read_text(encoding="utf-8")).get("data", {}) for path in self.configs]
        prefix = "data.init_args."
        arguments = {name: value for section in sections for name, value in section.get("init_args", {}).items()}
        arguments |= {
            name.removeprefix(prefix): value for name, value in self.settings().items() if name.startswith(prefix)
        }
        hparams = TwoViewDataModule(**arguments).hparams
        return hparams["global_batch_size"], hparams["num_probe_pairs"]

    @property
    def command(self) -> list[str]:
        """Command that trains the network."""
        configs = [f"--config={path}" for path in self.configs]
        settings = [f"--{name}={value}" for name, value in self.settings().items()]
        return [*self.launcher, sys.executable, "-m", _MODULE, "fit", *configs, *settings]

    @property
    def _identity(self) -> str:
        """Text that an earlier run must match to be reused; it contains no paths of outputs or data."""
        settings = {name: value for name, value in self.settings().items() if name not in _PLACES}
        text = "".join(path.read_text(encoding="utf-8") for path in self.configs)
        return json.dumps({"settings": settings, "config": text, "version": version("stepwise_lightning")})

    def is_finished(self) -> bool:
        """Return True if the run was trained completely with these settings and its files are intact.

        Print a warning if a finished run cannot be reused.
        """
        note = self.directory.parent / "settings.json"
        if not note.exists():
            return False
        if note.read_text(encoding="utf-8", errors="replace") != self._identity:
            problem = f"{note} has other settings"
        elif damaged := [path for path in (self.directory / "spectrum.npz", self.checkpoint) if not _intact(path)]:
            problem = f"{damaged[0]} is missing or damaged"
        else:
            return True
        print(f"warning: {problem}; training {self.name} again", file=sys.stderr)
        return False

    def train(self, resume: bool = False) -> None:
        """Train from the start, or with ``resume`` from the last checkpoint of interrupted training.

        The output goes to ``log.txt``. ``started.json`` is renamed to ``settings.json`` when training has finished.

        Raises:
            RunFailedError: training failed; RunDivergedError if it diverged.
            CannotWriteError: the settings cannot be written.
            SystemExit: training was stopped by SIGTERM or SIGUSR1.

        """
        with self._locked() as (lock, was_locked):
            if not (was_locked and resume and self.is_finished()):
                self._train(resume, lock)

    def _train(self, resume: bool, lock: int) -> None:
        folder, command = self.directory.parent, self.command
        started, log = folder / "started.json", folder / "log.txt"
        same = started.exists() and started.read_text(encoding="utf-8", errors="replace") == self._identity
        if resume and same and checkpoints_in(self.directory):
            command.append("--ckpt_path=last")
        else:
            shutil.rmtree(folder, ignore_errors=True)
            atomic_write_text(started, self._identity)
        with log.open("a", encoding="utf-8") as file:
            print("$", shlex.join(command), file=file, flush=True)
            self._process = self._begin(command, file, lock)
            status = self._process.wait()
            self._process = None
        # SIGUSR1 before its handler was installed ends the process with −SIGUSR1, or 128 + SIGUSR1 under srun.
        if status in (EX_TEMPFAIL, -signal.SIGUSR1, 128 + signal.SIGUSR1):
            print(f"training of {self.name} was stopped: continue with --resume", file=sys.stderr)
            raise SystemExit(EX_TEMPFAIL)
        if status:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            printed = [line for line in lines if line.strip() and not line.startswith(("$", "srun:"))]
            last = printed[-1] if printed else f"exit status {status}"
            failure = RunDivergedError if "most likely diverged" in last else RunFailedError
            raise failure(f"{self.name} failed, see {log}: {last}")
        os.replace(started, folder / "settings.json")

    def _begin(self, command: list[str], output: IO[str], lock: int) -> subprocess.Popen[bytes] | ForkedProcess:
        """Start the command with its output in ``output``; the process holds the lock until it ends."""
        if self.can_fork:
            return ForkedProcess(_MODULE, command[command.index(_MODULE) + 1 :], output, [lock])
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}  # keeps stdout and stderr in order
        if not torch.cuda.is_available():
            environment["OMP_NUM_THREADS"] = "1"
        return subprocess.Popen(command, stdout=output, stderr=output, env=environment, pass_fds=[lock])

    @property
    def can_fork(self) -> bool:
        """Return True if training can run in a forked process: without a launcher and without a GPU."""
        return not self.launcher and not torch.cuda.is_available()

    def stop(self) -> None:
        """Make running training save a checkpoint and end."""
        if (process := self._process) is not None:
            process.terminate()  # a second SIGINT, after one from the terminal, would end it without a checkpoint

    @contextmanager
    def _locked(self) -> Iterator[tuple[int, bool]]:
        """Acquire the lock of this run; yield its file descriptor, and whether another process held it.

        Training inherits the lock, which protects the folder until training has ended, even if this process is killed.
        """
        path = self.logs.parent / ".locks" / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            was_locked = False
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                was_locked = True
                print(f"another process trains {self.name}: waiting until it ends", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
            yield file.fileno(), was_locked

    @property
    def checkpoint(self) -> Path:
        """Path of the last checkpoint, or of the checkpoint folder if it is empty."""
        folder = self.directory / "checkpoints"
        return max(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, default=folder)


def _intact(path: Path) -> bool:
    """Return True if the checksums of a NumPy or torch file, a zip archive, are correct."""
    try:
        with ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # zipfile and zlib raise many types
        return False
