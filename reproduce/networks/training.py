"""Train one network behind the figures, with the command that anybody would use, and go on where that was cut short."""

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

from reproduce.forkserver import WarmProcess
from reproduce.networks.variants import CPU_STEPS, METHODS, VARIANTS
from stepwise_lightning.errors import UserError
from stepwise_lightning.files import atomic_write_text
from stepwise_lightning.signals import EX_TEMPFAIL

CONFIGS = Path(__file__).parent.parent / "configs"
# cpu is the shipped configuration as it is; smoke is a size for tests; full is the paper's.
PROFILES: dict[str, dict[str, Any]] = {"smoke": {}, "cpu": {}, "full": {"data": "stl10"}}
# Between the two: hours on a CPU, so that one figure has it alone.
MIDDLE: dict[str, dict[str, Any]] = {"middle": {"data": "cifar10"}}
_CONFIGURATION = {"smoke": "photos", "cpu": "photos", "middle": "cifar10_cpu", "full": "stl10"}
_MODULE = "stepwise_lightning"
_PLACES = (
    "data.init_args.root", "trainer.logger.init_args.save_dir", "trainer.default_root_dir", "trainer.callbacks.dirpath"
)  # fmt: skip
WEIGHTS_EVERY = 40  # training steps, between the weights that are kept of a run from small initialisation


class RunFailedError(RuntimeError, UserError):
    """Training has failed; the message ends with the last line that it wrote."""


class TrainingRun:
    """How one network is trained: once, however often and from wherever that is asked for."""

    def __init__(self, loss: str, variant: str, seed: int, options: argparse.Namespace) -> None:
        self.loss, self.variant, self.seed, self.options = loss, variant, seed, options
        self.name = f"{loss}_{variant}_seed{seed}"
        self.logs = Path(options.out) / "runs"
        self.directory = self.logs / self.name / "version_0"
        self.weights = self.logs / self.name / "weights"
        self.launcher = shlex.split(options.launcher)
        overlays, self._variant = VARIANTS[variant]
        self.configs = [CONFIGS / name for name in (f"{loss}_{_CONFIGURATION[options.profile]}.yaml", *overlays)]
        self._process: subprocess.Popen[bytes] | WarmProcess | None = None

    def settings(self) -> dict[str, Any]:
        """Return what the command line says besides the configurations."""
        settings: dict[str, Any] = {
            "seed_everything": self.seed,
            "model.init_args.encoder.init_args.seed": self.seed,
            "data.init_args.seed": self.seed,
            "data.init_args.data": self.options.data,
            "data.init_args.root": self.options.root,
            "trainer.logger.init_args.save_dir": str(self.logs),
            "trainer.logger.init_args.name": self.name,
            # Where Lightning saves when SLURM warns it: jobs side by side must not find each other's checkpoints.
            "trainer.default_root_dir": str(self.logs / self.name),
            "trainer.enable_progress_bar": "false",
        } | self._variant
        if self.variant == "small":
            settings |= {
                "trainer.callbacks+": "lightning.pytorch.callbacks.ModelCheckpoint",
                "trainer.callbacks.dirpath": str(self.weights),
                "trainer.callbacks.filename": "{step}",
                "trainer.callbacks.every_n_train_steps": WEIGHTS_EVERY,
                "trainer.callbacks.save_top_k": -1,
                "trainer.callbacks.save_weights_only": "true",
            }
        if self.options.profile == "cpu" and self.variant in CPU_STEPS:
            settings["trainer.max_steps"] = CPU_STEPS[self.variant]
        if self.options.profile == "smoke":
            settings |= {
                "model.init_args.encoder.init_args.out_features": 4,
                "model.init_args.learning_rate": METHODS[self.loss].smoke_learning_rate,
                "model.init_args.momentum": 0.9,
                "data.init_args.global_batch_size": 32,
                "data.init_args.num_probe_pairs": 64,
                "trainer.max_steps": 300,
            }
        return settings

    @property
    def command(self) -> list[str]:
        """What trains it."""
        configs = [f"--config={path}" for path in self.configs]
        settings = [f"--{name}={value}" for name, value in self.settings().items()]
        return [*self.launcher, sys.executable, "-m", _MODULE, "fit", *configs, *settings]

    @property
    def _identity(self) -> str:
        """What must be the same for an earlier run to serve; where its files lie is no part of it."""
        settings = {name: value for name, value in self.settings().items() if name not in _PLACES}
        text = "".join(path.read_text(encoding="utf-8") for path in self.configs)
        return json.dumps({"settings": settings, "config": text, "version": version("stepwise_lightning")})

    def is_finished(self) -> bool:
        """Return whether it was trained, to the end, with these very settings, and all of it is still there.

        What has to be trained again, though it looks finished, is told in one line.
        """
        note = self.directory.parent / "settings.json"
        if not note.exists():
            return False
        if note.read_text(encoding="utf-8", errors="replace") != self._identity:
            problem = f"{note} is not of these settings"
        elif damaged := [path for path in (self.directory / "spectrum.npz", self.checkpoint) if not _intact(path)]:
            problem = f"{damaged[0]} is missing or damaged"
        else:
            return True
        print(f"warning: {problem}; {self.name} is trained again", file=sys.stderr)
        return False

    def train(self, resume: bool = False) -> None:
        """Train it anew, or go on where earlier training of the same was cut short.

        What it prints is in ``log.txt``. ``started.json`` becomes ``settings.json`` when it is finished.

        Raises:
            RunFailedError: it failed.
            CannotWriteError: there is no room for its settings.
            SystemExit: it was told to stop, by SIGTERM or SIGUSR1.

        """
        with self._alone() as (lock, waited):
            if not (waited and resume and self.is_finished()):
                self._train(resume, lock)

    def _train(self, resume: bool, lock: int) -> None:
        folder, command = self.directory.parent, self.command
        started, log = folder / "started.json", folder / "log.txt"
        same = started.exists() and started.read_text(encoding="utf-8", errors="replace") == self._identity
        if resume and same and list(self.directory.rglob("*.ckpt")):
            command.append("--ckpt_path=last")
        else:
            shutil.rmtree(folder, ignore_errors=True)
            atomic_write_text(started, self._identity)
        with log.open("a", encoding="utf-8") as file:
            print("$", shlex.join(command), file=file, flush=True)
            self._process = self._begin(command, file, lock)
            status = self._process.wait()
            self._process = None
        # The other two, of which srun makes the second: the signal came before it was ready to listen.
        if status in (EX_TEMPFAIL, -signal.SIGUSR1, 128 + signal.SIGUSR1):
            print(f"{self.name} was told to stop: it goes on with --resume", file=sys.stderr)
            raise SystemExit(EX_TEMPFAIL)
        if status:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            printed = [line for line in lines if line.strip() and not line.startswith(("$", "srun:"))]
            last = printed[-1] if printed else f"exit status {status}"
            raise RunFailedError(f"{self.name} failed, see {log}: {last}")
        os.replace(started, folder / "settings.json")

    def _begin(self, command: list[str], output: IO[str], lock: int) -> subprocess.Popen[bytes] | WarmProcess:
        """Start the command; what it prints goes to ``output``, and it keeps the lock until it ends."""
        if self.is_warm:
            return WarmProcess(_MODULE, command[command.index(_MODULE) + 1 :], output, [lock])
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}  # or its last line would not be its last
        if not torch.cuda.is_available():
            environment["OMP_NUM_THREADS"] = "1"
        return subprocess.Popen(command, stdout=output, stderr=output, env=environment, pass_fds=[lock])

    @property
    def is_warm(self) -> bool:
        """Whether it need not be started anew: no launcher does that, and no GPU, which a fork might not find."""
        return not self.launcher and not torch.cuda.is_available()

    def stop(self) -> None:
        """Tell training that is under way to save itself and end."""
        if (process := self._process) is not None:
            process.terminate()  # a second SIGINT, where a terminal has sent one, would end it at once

    @contextmanager
    def _alone(self) -> Iterator[tuple[int, bool]]:
        """Wait until no other process trains this run; yield the lock, as a file descriptor, and whether one did.

        Training inherits it: were this process killed, nobody else may write there until that has saved itself too.
        """
        path = self.logs.parent / ".locks" / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            waited = False
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waited = True
                print(f"{self.name} is being trained by another process: waiting until that ends", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
            yield file.fileno(), waited

    @property
    def checkpoint(self) -> Path:
        """The last checkpoint; if there is none, the folder where it should be."""
        folder = self.directory / "checkpoints"
        return max(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, default=folder)


def _intact(path: Path) -> bool:
    """Return whether a file of NumPy or torch, which both are zip archives with checksums, is whole."""
    try:
        with ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # zipfile and zlib raise whatever they come across
        return False
