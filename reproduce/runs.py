"""The training runs behind the figures of the three losses: trained once, read by all of them.

Each loss trains an encoder from small or from ordinary initialisation with a shipped configuration and the command line
that anybody would use, ``stepwise fit --config configs/<loss>_<data>[_ordinary].yaml``, and is read back from what that
writes. All lie in ``<out>/runs``; with ``--resume`` a figure takes those that another one, or ``python -m
reproduce.train``, has trained, and training that was cut short goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from itertools import product
from threading import Event
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from tqdm import tqdm

from reproduce.training import CONFIGS, TrainingRun
from stepwise_lightning import TwoViewDataModule
from stepwise_lightning.spectrum.capture import capture
from stepwise_lightning.encoders import Encoder
from stepwise_lightning.data.image_sets import load_image_set
from stepwise_lightning.plots.trajectories import Trajectory
from stepwise_lightning.results import load_spectra, reason
from stepwise_lightning.spectrum.measures import Steps, detect_steps
from stepwise_lightning.theory import LinearBarlowTwins, feature_cross_correlation

LOSSES = ("barlow_twins", "vicreg", "simclr")
TITLES = {"barlow_twins": "Barlow Twins", "vicreg": "VICReg", "simclr": "SimCLR"}
# Barlow Twins drives the eigenvalues of C from 0 to 1; VICReg knows no scale but that of its variance; SimCLR sees
# normalised embeddings alone.
JUDGED = {"barlow_twins": "cross_correlation", "vicreg": "covariance", "simclr": "normalized_covariance"}
EIGENVALUES = {"barlow_twins": "C", "vicreg": "covariance", "simclr": "normalised covariance"}
# The layer whose output the last linear layer of each projector takes, by the projector's depth.
_FEATURES = {1: "backbone", 2: "projector.2"}


class Run(TrainingRun):
    """One training run, and what came of it."""

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
                state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)["state_dict"]
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
        futures = [pool.submit(train, run) for run in missing]
        try:
            for future in futures:
                future.result()
        except KeyboardInterrupt:
            ended.set()
            for run in missing:
                run.stop()
            raise
    return runs
