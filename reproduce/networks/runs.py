"""Training runs that the figures share, and their measurements.

A run is the output of ``stepwise fit --config configs/<loss>_<data>.yaml [--config configs/ordinary.yaml]`` in
``<out>/runs``. With ``--resume`` a figure reuses runs that another figure or ``python -m reproduce.train`` has trained,
and continues interrupted training from the last checkpoint.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from itertools import product
from pathlib import Path
from pkgutil import resolve_name
from threading import Event
from typing import Any

import torch
from torch import Tensor, nn

from reproduce.networks.training import CONFIGS, TrainingRun
from reproduce.networks.variants import ALL_LOSS_SETTINGS, CPU_STEPS, LOSS_SETTINGS, LossSettings
from reproduce.options import require_images
from reproduce.processes import Progress, start_forkserver
from reproduce.records import data_rows
from stepwise_lightning import SpectrumRecord, TwoViewDataModule
from stepwise_lightning.data import load_image_set
from stepwise_lightning.errors import NotFoundError, UserError, reason
from stepwise_lightning.forecasts.forecast import Forecast
from stepwise_lightning.forecasts.sgd import SGDSettings, last_features, last_layer
from stepwise_lightning.forecasts.simulate import NUM_PAIRS, forecast_of_features, unseen_batches
from stepwise_lightning.modules import JointEmbedding
from stepwise_lightning.plots import Panel
from stepwise_lightning.runs.saved import configuration_of, configured_encoder, load_weights
from stepwise_lightning.spectrum import Rises, Steps, detect_rises


class Run(TrainingRun):
    """One training run and its results."""

    @property
    def loss_settings(self) -> LossSettings:
        """Per-loss settings of the figures."""
        return ALL_LOSS_SETTINGS[self.loss]

    @cached_property
    def record(self) -> SpectrumRecord:
        """Measurements of the SpectrumLogger."""
        return SpectrumRecord.load(self.directory)

    @cached_property
    def steps(self) -> Steps:
        """Steps in the eigenvalues of the matrix that the loss drives."""
        return self.record.detect_steps(self.loss_settings.matrix)

    @cached_property
    def rises(self) -> Rises:
        """Rises of the same eigenvalues, independent of their initial values."""
        return detect_rises(self.record.times, self.eigenvalues())

    def eigenvalues(self) -> Tensor:
        """Return the eigenvalues of the matrix that the loss drives, (T, d)."""
        return self.record.eigenvalues(self.loss_settings.matrix)

    def plateau(self, learned: int) -> list[int]:
        """Return the indices of the measurements with this number of learned modes; possibly empty."""
        return (self.steps.num_learned == learned).nonzero().flatten().tolist()

    def embeddings(self, learned: int) -> Tensor | None:
        """Return the first embeddings with this number of learned modes, as :meth:`embedded`, or None.

        The first are used because features, and with them the learned directions, change during the plateau.
        """
        return self.embedded(self.plateau(learned)[0]) if self.plateau(learned) else None

    def embedded(self, index: int) -> Tensor:
        """Return the embeddings of both views at measurement ``index``, (2n, d), centred; SimCLR's are normalised."""
        z = self.record.embeddings(index).double().flatten(0, 1)
        z = nn.functional.normalize(z) if self.loss_settings.loss.scale_invariant else z
        return z - z.mean(0)

    @property
    def _configuration_path(self) -> Path:
        """Path of a checkpoint next to which ``config.yaml`` is found."""
        return self.directory / "checkpoints" / "last.ckpt"

    @cached_property
    def _config(self) -> dict[str, dict[str, Any]]:
        with self._readable("config.yaml"):
            config = configuration_of(self._configuration_path)
            return {name: config[name]["init_args"] for name in ("model", "data")}

    @contextmanager
    def _readable(self, file: str) -> Iterator[None]:
        """Convert errors from a damaged file into a UserError that names the run and the file."""
        try:
            yield
        except Exception as error:  # YAML, torch and our constructors raise different types
            raise UserError(
                f"{file} in {str(self.directory)!r} cannot be used ({reason(error)}): train again, without --resume"
            ) from error

    def encoder(self, trained: bool = False, step: int | None = None) -> nn.Module:
        """Return the encoder at initialisation, after training, or at one of the :meth:`saved_steps`."""
        with self._readable("config.yaml"):
            encoder = configured_encoder(self._configuration_path)
        if trained or step:
            path = self.weights / f"step={step}.ckpt" if step else self.checkpoint
            with self._readable("the checkpoint"):
                load_weights(encoder, path)
        return encoder

    def saved_steps(self) -> list[int]:
        """Return the training steps with saved weights, ascending."""
        return sorted(int(path.stem.removeprefix("step=")) for path in self.weights.glob("step=*.ckpt"))

    @cached_property
    def data(self) -> TwoViewDataModule:
        """Data module of the run."""
        settings = self._config["data"]
        with self._readable("config.yaml"):
            cls = resolve_name(self._variant.get("data.class_path", "stepwise_lightning.TwoViewDataModule"))
            data = cls(**settings | {"seed": self.seed})
            data.setup("fit")
        return data

    def initial_features(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the last layer's inputs for both views of the probe pairs, and its weights, at initialisation.

        Inputs (n, m) each, centred, and weights (d, m), float64.
        """
        layer, pairs = last_layer(self.module), self.data.probe_pairs()
        h1, h2 = (h[0].double() for h in last_features(self.module, layer, [pairs], len(pairs[0])))
        return h1 - h1.mean(0), h2 - h2.mean(0), layer.weight.detach().double()

    def optimization(self) -> tuple[float, float]:
        """Return learning rate and momentum."""
        with self._readable("config.yaml"):
            return float(self._config["model"]["learning_rate"]), float(self._config["model"]["momentum"])

    @cached_property
    def module(self) -> JointEmbedding:
        """Lightning module at initialisation."""
        with self._readable("config.yaml"):
            settings = {name: value for name, value in self._config["model"].items() if name != "encoder"}
            return self.loss_settings.module(self.encoder(), **settings)

    @cached_property
    def features(self) -> tuple[Tensor, Tensor]:
        """Last layer's inputs at initialisation for 4096 training pairs with new views.

        One tensor per view, (batches, n, m), in batches of the training size.
        """
        module = self.module.to("cuda" if torch.cuda.is_available() else "cpu")
        return last_features(module, last_layer(module), unseen_batches(self.data), NUM_PAIRS)

    @cached_property
    def forecast(self) -> Forecast:
        """Forecast of the step times from the untrained network."""
        return self.forecast_of(*self.features)

    def forecast_of(self, h1: Tensor, h2: Tensor, **changes: Any) -> Forecast:
        """Return a forecast for other features, (batches, n, m), or with changed fields of the SGD settings."""
        layer, length = last_layer(self.module), int(self.record.steps[-1])
        training = replace(SGDSettings.of(self.module, 0, length), **changes)
        return forecast_of_features(training, h1, h2, layer.weight, layer.bias, with_rates=False)

    def panel(self, with_forecast: bool = False) -> Panel:
        """Return a panel with loss, eigenvalues, detected steps, and optionally the forecast."""
        count = self.steps.num_distinct
        theory = None
        if with_forecast:
            values = self.forecast.reliable_eigenvalues(self.record.steps)
            losses = (1 - values).square().sum(1) if self.loss == "barlow_twins" else None
            if values.isfinite().any():  # modes with large initial eigenvalues have no forecast
                theory = SpectrumRecord.of(
                    self.record.times, values, losses, self.loss_settings.matrix, self.record.steps
                )
        title = f"{self.loss_settings.title}: {count} distinct step{'s' * (count != 1)}"
        return Panel(self.record, self.loss_settings.matrix, title, theory, step_times=self.steps.step_times)

    def rows(self, others: Mapping[str, Tensor] | None = None) -> list[list[Any]]:
        """Return rows of ``data.csv`` with ``ROW_COLUMNS``, including further quantities (T, k) by name."""
        return data_rows([self.loss, self.variant, self.seed], self.record, self.loss_settings.matrix, others=others)

    def summary(self) -> dict[str, Any]:
        """Return the run's row in the table."""
        return {
            "loss": self.loss,
            "variant": self.variant,
            "seed": self.seed,
            "modes_learned": int(self.steps.num_learned[-1]),
            "distinct_steps": self.steps.num_distinct,
            "plateaus": self.steps.num_plateaus,
            "stepwiseness": round(self.steps.stepwiseness, 2),
            "modes_apart": self.rises.num_apart,
            "modes_risen": self.rises.num_modes,
            "separation": round(self.rises.separation, 2),
            "training_steps": int(self.record.steps[-1]),
        }


SMALL_INITIALIZATION = [(loss, "small") for loss in LOSS_SETTINGS]
ROW_COLUMNS = ["loss", "variant", "seed", "step", "time", "quantity", "mode", "value"]


def distinct_steps(runs: Iterable[Run], loss: str, variant: str) -> list[int]:
    """Return the number of distinct steps of each run of a loss and variant, in the order of the seeds."""
    return [run.steps.num_distinct for run in runs if (run.loss, run.variant) == (loss, variant)]


def plateaus(runs: Iterable[Run], loss: str, variant: str) -> list[int]:
    """Return the number of steps after a plateau of the loss of each run, as :func:`distinct_steps`."""
    return [run.steps.num_plateaus for run in runs if (run.loss, run.variant) == (loss, variant)]


def trained_runs(options: argparse.Namespace, kinds: Iterable[tuple[str, str]] = SMALL_INITIALIZATION) -> list[Run]:
    """Train missing runs (all runs without ``--resume``), one per core, or one at a time on GPUs.

    Args:
        options: command-line options of the figure.
        kinds: pairs of loss and variant, each trained once for every seed.

    Raises:
        UserError: invalid data set or launcher; raised before anything is written.
        RunFailedError: a run failed.
        SystemExit: a run was stopped by a signal.

    """
    if not CONFIGS.is_dir():
        raise NotFoundError(f"no configurations in {str(CONFIGS)!r}: run this from a clone of the repository")
    runs = [Run(*kind, seed, options) for seed, kind in product(options.seeds, kinds)]
    if runs[0].launcher and not shutil.which(runs[0].launcher[0]):
        raise UserError(f"launcher {runs[0].launcher[0]!r} is not installed: see --launcher")
    load_image_set(options.data, "val", options.root, options.download)
    require_images(options, *map(max, zip(*(run.num_images() for run in runs), strict=True)))
    missing = [run for run in runs if not (options.resume and run.is_finished())]
    if options.profile == "cpu":  # long runs first: a long last run would leave cores idle
        missing.sort(key=lambda run: run.variant in CPU_STEPS)
    with Progress("networks", len(runs), completed=len(runs) - len(missing)) as progress:
        _train(missing, options.resume, progress)
    return runs


def _train(runs: list[Run], resume: bool, progress: Progress) -> None:
    """Train runs in parallel; after a failure or a stop signal, start no more runs."""
    if any(run.can_fork for run in runs):
        start_forkserver()  # in the main thread, which receives Ctrl-C
    workers = 1 if torch.cuda.is_available() else min(os.cpu_count() or 1, max(len(runs), 1))
    ended = Event()

    def train(run: Run) -> None:
        if ended.is_set():
            return
        try:
            run.train(resume)
        except BaseException:
            ended.set()
            raise

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(train, run) for run in runs]
        try:
            progress.wait_for(futures)
        except KeyboardInterrupt:
            ended.set()
            for run in runs:
                run.stop()
            raise
