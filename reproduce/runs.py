"""The training runs behind the figures of the three losses: trained once, read by all of them.

Each loss trains an encoder from small or from ordinary initialisation with a shipped configuration and the command line
that anybody would use, ``stepwise fit --config configs/<loss>_<data>[_ordinary].yaml``, and is read back from what that
writes. All lie in ``<out>/runs``; with ``--resume`` a figure takes those that another one, or ``python -m
reproduce.train``, has trained, and training that was cut short goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import version
from itertools import product
from pathlib import Path
from threading import Event
from typing import Any
from zipfile import ZipFile

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from tqdm import tqdm

from stepwise_lightning import TwoViewDataModule
from stepwise_lightning.capture import capture
from stepwise_lightning.checkpoints import TO_BE_CONTINUED
from stepwise_lightning.encoders import Encoder
from stepwise_lightning.files import replace_text
from stepwise_lightning.images import load_image_set
from stepwise_lightning.plots import Trajectory
from stepwise_lightning.results import load_spectra, reason
from stepwise_lightning.spectrum import Steps, detect_steps
from stepwise_lightning.theory import LinearBarlowTwins, feature_cross_correlation

CONFIGS = Path(__file__).parent.parent / "configs"
LOSSES = ("barlow_twins", "vicreg", "simclr")
TITLES = {"barlow_twins": "Barlow Twins", "vicreg": "VICReg", "simclr": "SimCLR"}
# Barlow Twins drives the eigenvalues of C from 0 to 1; VICReg knows no scale but that of its variance; SimCLR sees
# normalised embeddings alone.
JUDGED = {"barlow_twins": "cross_correlation", "vicreg": "covariance", "simclr": "normalized_covariance"}
EIGENVALUES = {"barlow_twins": "C", "vicreg": "covariance", "simclr": "normalised covariance"}
# cpu is the shipped configuration as it is; smoke is a size for tests; full is the paper's.
PROFILES: dict[str, dict[str, Any]] = {"smoke": {}, "cpu": {}, "full": {"data": "stl10"}}
_CONFIGURATION = {"smoke": "photos", "cpu": "photos", "full": "stl10"}
_SMOKE_RATES = {"barlow_twins": 0.003, "vicreg": 0.001, "simclr": 0.0005}
_PLACES = ("data.init_args.root", "trainer.logger.init_args.save_dir", "trainer.default_root_dir")
# The layer whose output the last linear layer of each projector takes, by the projector's depth.
_FEATURES = {1: "backbone", 2: "projector.2"}


class Run:
    """One training run: how it is trained, and what came of it."""

    def __init__(self, loss: str, start: str, seed: int, options: argparse.Namespace) -> None:
        self.loss, self.start, self.seed = loss, start, seed
        self.name = f"{loss}_{start}_seed{seed}"
        self.logs = Path(options.out) / "runs"
        self.directory = self.logs / self.name / "version_0"
        self.launcher = shlex.split(options.launcher)
        suffix = "_ordinary" if start == "ordinary" else ""
        self.config = CONFIGS / f"{loss}_{_CONFIGURATION[options.profile]}{suffix}.yaml"
        self.settings = self._settings(options)

    def _settings(self, options: argparse.Namespace) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "seed_everything": self.seed,
            "model.init_args.encoder.init_args.seed": self.seed,
            "data.init_args.seed": self.seed,
            "data.init_args.data": options.data,
            "data.init_args.root": options.root,
            "trainer.logger.init_args.save_dir": str(self.logs),
            "trainer.logger.init_args.name": self.name,
            # Where Lightning saves when SLURM warns it: jobs side by side must not find each other's checkpoints.
            "trainer.default_root_dir": str(self.logs / self.name),
            "trainer.enable_progress_bar": "false",
        }
        if options.profile == "smoke":
            settings |= {
                "model.init_args.encoder.init_args.out_features": 4,
                "model.init_args.learning_rate": _SMOKE_RATES[self.loss],
                "data.init_args.global_batch_size": 32,
                "data.init_args.num_probe_pairs": 64,
                "trainer.max_steps": 300,
            }
        return settings

    @property
    def command(self) -> list[str]:
        """What trains it."""
        settings = [f"--{name}={value}" for name, value in self.settings.items()]
        stepwise = [sys.executable, "-m", "stepwise_lightning", "fit", f"--config={self.config}"]
        return [*self.launcher, *stepwise, *settings]

    @property
    def _identity(self) -> str:
        """What must be the same for an earlier run to serve; where its files lie is no part of it."""
        settings = {name: value for name, value in self.settings.items() if name not in _PLACES}
        text = self.config.read_text(encoding="utf-8")
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
        elif damaged := [path for path in (self.directory / "spectrum.npz", self._checkpoint) if not _intact(path)]:
            problem = f"{damaged[0]} is missing or damaged"
        else:
            return True
        print(f"warning: {problem}; {self.name} is trained again", file=sys.stderr)
        return False

    def train(self, resume: bool = False) -> None:
        """Train it anew, or go on where earlier training of the same was cut short.

        What it prints is in ``log.txt``. ``started.json`` becomes ``settings.json`` when it is finished.

        Raises:
            RuntimeError: it failed; the message ends with the last line that it wrote.
            SystemExit: it was told to stop, by SIGTERM or SIGUSR1.

        """
        folder, command = self.directory.parent, self.command
        started, log = folder / "started.json", folder / "log.txt"
        same = started.exists() and started.read_text(encoding="utf-8", errors="replace") == self._identity
        if resume and same and list(folder.rglob("*.ckpt")):
            command.append("--ckpt_path=last")
        else:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            replace_text(started, self._identity)
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}  # or its last line would not be its last
        if not torch.cuda.is_available():
            environment["OMP_NUM_THREADS"] = "1"
        with log.open("a", encoding="utf-8") as file:
            print("$", shlex.join(command), file=file, flush=True)
            done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        # The other two, of which srun makes the second: the signal came before it was ready to listen.
        if done.returncode in (TO_BE_CONTINUED, -signal.SIGUSR1, 128 + signal.SIGUSR1):
            print(f"{self.name} was told to stop: it goes on with --resume", file=sys.stderr)
            raise SystemExit(TO_BE_CONTINUED)
        if done.returncode:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            said = [line for line in lines if line.strip() and not line.startswith(("$", "srun:"))]
            last = said[-1] if said else f"exit status {done.returncode}"
            raise RuntimeError(f"{self.name} failed, see {log}: {last}")
        os.replace(started, folder / "settings.json")

    @cached_property
    def spectra(self) -> dict[str, np.ndarray[Any, Any]]:
        """``spectrum.npz``: see :class:`stepwise_lightning.SpectrumLogger`."""
        return load_spectra(self.directory)

    @cached_property
    def found(self) -> Steps:
        """The steps in the eigenvalues that this loss is judged by."""
        return detect_steps(torch.from_numpy(self.spectra["time"]), torch.from_numpy(self.eigenvalues()))

    def eigenvalues(self, submodule: str = "") -> np.ndarray[Any, Any]:
        """Return the eigenvalues, (T, d), of the matrix that this loss is judged by; a submodule's covariance."""
        return self.spectra[f"{submodule}.covariance" if submodule else JUDGED[self.loss]]

    def plateau(self, learned: int) -> list[int]:
        """Return the measurements at which so many modes were learned; perhaps none."""
        return (self.found.num_learned == learned).nonzero().flatten().tolist()

    def embeddings(self, learned: int) -> Tensor | None:
        """Return the first embeddings with so many learned modes, as :meth:`embedded`; None if there never were.

        Later on the same plateau the network's features have moved, and the learned directions with them.
        """
        return self.embedded(self.plateau(learned)[0]) if self.plateau(learned) else None

    def embedded(self, index: int) -> Tensor:
        """Return the embeddings of measurement ``index``, both views, (2n, d), centred.

        Those of SimCLR are normalised first: it sees no others.
        """
        z = torch.from_numpy(self.spectra["embeddings"][index]).double().flatten(0, 1)
        z = nn.functional.normalize(z) if self.loss == "simclr" else z
        return z - z.mean(0)

    @property
    def _checkpoint(self) -> Path:
        """The last checkpoint; if there is none, the folder where it should be."""
        folder = self.directory / "checkpoints"
        return max(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, default=folder)

    @cached_property
    def _config(self) -> dict[str, Any]:
        with self._readable("config.yaml"):
            config = yaml.safe_load((self.directory / "config.yaml").read_text(encoding="utf-8"))
            return {"encoder": config["model"]["init_args"]["encoder"]["init_args"]} | {
                name: config[name]["init_args"] for name in ("model", "data")
            }

    @contextmanager
    def _readable(self, what: str) -> Iterator[None]:
        """Name this run and the file where that is damaged."""
        try:
            yield
        except Exception as error:  # YAML, torch and our own constructors raise each their own
            raise ValueError(
                f"{what} in {str(self.directory)!r} cannot be used ({reason(error)}): train again, without --resume"
            ) from error

    def encoder(self, trained: bool) -> Encoder:
        """Return its encoder as it was at the start or at the end."""
        settings = self._config["encoder"]
        with self._readable("config.yaml"):
            encoder = Encoder(**settings)
        if trained:
            with self._readable("the checkpoint"):
                state = torch.load(self._checkpoint, map_location="cpu", weights_only=True)["state_dict"]
                encoder.load_state_dict({key.removeprefix("encoder."): value for key, value in state.items()})
        return encoder

    @cached_property
    def data(self) -> TwoViewDataModule:
        """The data that it was trained and measured on."""
        settings = self._config["data"]
        with self._readable("config.yaml"):
            data = TwoViewDataModule(**settings)
            data.setup("fit")
        return data

    def predicted(self) -> LinearBarlowTwins:
        """Return what the linear theory says of Barlow Twins' last layer, were the features before it to stay.

        Momentum m is not in the theory. While a mode grows, heavy-ball descent multiplies its weights by x at each
        step, (x − 1)(1 − m/x) = 4 η γ; the mode is given the γ′ = ln x / 4η that grows as fast without momentum.
        """
        encoder, optimization = self.encoder(trained=False), self._config["model"]
        depth = sum(isinstance(layer, nn.Linear) for layer in encoder.projector)
        with self._readable("config.yaml"):
            rate, momentum = float(optimization["learning_rate"]), float(optimization["momentum"])
            features = _FEATURES[depth]
        with torch.no_grad():
            h1, h2 = capture(encoder, list(self.data.probe_pairs()), [features])[features]
        gamma, basis = torch.linalg.eigh(feature_cross_correlation(h1 - h1.mean(0), h2 - h2.mean(0)))
        total = 1 + momentum + 4 * rate * gamma
        growth = (total + (total.square() - 4 * momentum).clamp(min=0).sqrt()) / 2
        effective = torch.where(gamma > 0, growth.log() / (4 * rate), gamma / (1 - momentum))
        last = encoder.projector[-1]
        assert isinstance(last, nn.Linear)
        # W Γ Wᵀ, the embeddings' C, must stay what it is.
        weights = last.weight.detach().double() @ basis * (gamma / effective).clamp(min=0).sqrt() @ basis.T
        return LinearBarlowTwins(basis * effective @ basis.T, weights)

    def trajectory(self, with_theory: bool = False) -> Trajectory:
        """Return loss and eigenvalues, the steps detected, and perhaps what is :meth:`predicted`."""
        count, times = self.found.num_distinct, torch.from_numpy(self.spectra["time"])
        theory = self.predicted() if with_theory else None
        return Trajectory(
            title=f"{TITLES[self.loss]}: {count} distinct step{'s' * (count != 1)}",
            times=self.spectra["time"],
            losses=self.spectra["loss"],
            eigenvalues=self.eigenvalues(),
            theory_losses=theory.loss(times).numpy() if theory else None,
            theory_eigenvalues=theory.embedding_eigenvalues(times).numpy() if theory else None,
            step_times=self.found.step_times.numpy(),
            eigenvalues_label=f"eigenvalues, {EIGENVALUES[self.loss]}",
        )

    def rows(self) -> list[list[Any]]:
        """Return rows ``loss, start, seed, step, time, quantity, mode, value``."""
        rows: list[list[Any]] = []
        spectra, values = self.spectra, self.eigenvalues()
        for index, step in enumerate(spectra["step"]):
            head = [self.loss, self.start, self.seed, step, spectra["time"][index]]
            rows.append([*head, "loss", "", spectra["loss"][index]])
            rows += [[*head, "eigenvalue", mode, value] for mode, value in enumerate(values[index])]
        return rows

    def summary(self) -> dict[str, Any]:
        """Return its row in the table."""
        return {
            "loss": self.loss,
            "start": self.start,
            "seed": self.seed,
            "modes_learned": int(self.found.num_learned[-1]),
            "distinct_steps": self.found.num_distinct,
            "stepwiseness": round(self.found.stepwiseness, 2),
            "training_steps": int(self.spectra["step"][-1]),
        }


ROW_COLUMNS = ["loss", "start", "seed", "step", "time", "quantity", "mode", "value"]


def trained_runs(
    options: argparse.Namespace, losses: tuple[str, ...] = LOSSES, starts: tuple[str, ...] = ("small",)
) -> list[Run]:
    """Train what is missing (all of it without ``--resume``), as many at once as there are cores; on GPUs, one.

    Raises:
        ValueError, FileNotFoundError: bad data; raised before anything is written.
        RuntimeError: a run failed.
        SystemExit: a run was told to stop.

    """
    if not CONFIGS.is_dir():
        raise FileNotFoundError(f"no configurations in {str(CONFIGS)!r}: run this from a clone of the repository")
    runs = [Run(loss, start, seed, options) for seed, start, loss in product(options.seeds, starts, losses)]
    if runs[0].launcher and not shutil.which(runs[0].launcher[0]):
        raise ValueError(f"no command {runs[0].launcher[0]!r} here to start training with: see --launcher")
    load_image_set(options.data, "val", options.root, options.download)
    missing = [run for run in runs if not (options.resume and run.is_finished())]
    workers = 1 if torch.cuda.is_available() else min(os.cpu_count() or 1, max(len(missing), 1))
    ended = Event()

    def train(run: Run) -> None:
        if ended.is_set():  # the job has to end, or others would fail in the same way
            return
        try:
            run.train(options.resume)
        except BaseException:
            ended.set()
            raise
        bar.update()

    bar = tqdm(total=len(runs), initial=len(runs) - len(missing), desc="training networks", unit="run")
    with bar, ThreadPoolExecutor(workers) as pool:
        for future in [pool.submit(train, run) for run in missing]:
            future.result()
    return runs


def _intact(path: Path) -> bool:
    """Return whether a file of NumPy or torch, which both are zip archives with checksums, is whole."""
    try:
        with ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # zipfile has many words for damage
        return False
