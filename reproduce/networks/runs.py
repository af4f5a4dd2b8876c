"""The training runs behind the figures of the three losses: trained once, read by all of them.

Each loss trains an encoder from small or from ordinary initialisation with a shipped configuration and the command line
that anybody would use, ``stepwise fit --config configs/<loss>_<data>.yaml [--config configs/ordinary.yaml]``, and is
read back from what that writes. All lie in ``<out>/runs``; with ``--resume`` a figure takes those that another one, or
``python -m reproduce.train``, has trained, and training that was cut short goes on from its last checkpoint.
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
from threading import Event
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from tqdm import tqdm

from reproduce.forkserver import warm_up
from reproduce.networks.training import CONFIGS, TrainingRun
from reproduce.networks.variants import CPU_STEPS, METHODS, Method
from reproduce.records import data_rows
from stepwise_lightning import Encoder, SpectrumRecord, TwoViewDataModule
from stepwise_lightning.data import load_image_set
from stepwise_lightning.encoders import bias_of
from stepwise_lightning.errors import NotFoundError, UserError, reason
from stepwise_lightning.forecasts.forecast import Forecast
from stepwise_lightning.forecasts.sgd import SGDSettings, last_features, last_layer
from stepwise_lightning.forecasts.simulate import NUM_PAIRS, forecast_of_features, unseen_batches
from stepwise_lightning.modules import JointEmbedding
from stepwise_lightning.plots import Panel
from stepwise_lightning.spectrum import Rises, Steps, detect_rises


class Run(TrainingRun):
    """One training run, and what came of it."""

    @property
    def method(self) -> Method:
        """What its loss is to the figures."""
        return METHODS[self.loss]

    @cached_property
    def record(self) -> SpectrumRecord:
        """What it has measured."""
        return SpectrumRecord.load(self.directory)

    @cached_property
    def steps(self) -> Steps:
        """The steps in the eigenvalues that its loss is judged by."""
        return self.record.detect_steps(self.method.matrix)

    @cached_property
    def rises(self) -> Rises:
        """How they rise, from whatever start."""
        return detect_rises(self.record.times, self.eigenvalues())

    def eigenvalues(self) -> Tensor:
        """Return the eigenvalues that its loss is judged by, (T, d)."""
        return self.record.eigenvalues(self.method.matrix)

    def plateau(self, learned: int) -> list[int]:
        """Return the measurements at which so many modes were learned; perhaps none."""
        return (self.steps.num_learned == learned).nonzero().flatten().tolist()

    def embeddings(self, learned: int) -> Tensor | None:
        """Return the first embeddings with so many learned modes, as :meth:`embedded`; None if there never were.

        Later on the same plateau the network's features have moved, and the learned directions with them.
        """
        return self.embedded(self.plateau(learned)[0]) if self.plateau(learned) else None

    def embedded(self, index: int) -> Tensor:
        """Return the embeddings of measurement ``index``, both views, (2n, d), centred.

        Those of SimCLR are normalised first: it sees no others.
        """
        z = self.record.embeddings(index).double().flatten(0, 1)
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
    def _readable(self, file: str) -> Iterator[None]:
        """Name this run and the file where that is damaged."""
        try:
            yield
        except Exception as error:  # YAML, torch and our own constructors raise each their own
            raise UserError(
                f"{file} in {str(self.directory)!r} cannot be used ({reason(error)}): train again, without --resume"
            ) from error

    def encoder(self, trained: bool = False, step: int | None = None) -> Encoder:
        """Return its encoder as it was at the start, at the end, or after one of :meth:`kept_steps`."""
        settings = self._config["encoder"]
        with self._readable("config.yaml"):
            encoder = Encoder(**settings)
        if trained or step:
            path = self.weights / f"step={step}.ckpt" if step else self.checkpoint
            with self._readable("the checkpoint"):
                state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
                encoder.load_state_dict({key.removeprefix("encoder."): value for key, value in state.items()})
        return encoder

    def kept_steps(self) -> list[int]:
        """Return the training steps after which weights were kept, ascending."""
        return sorted(int(path.stem.removeprefix("step=")) for path in self.weights.glob("step=*.ckpt"))

    @cached_property
    def data(self) -> TwoViewDataModule:
        """The data that it was trained and measured on."""
        settings = self._config["data"]
        with self._readable("config.yaml"):
            data = TwoViewDataModule(**settings)
            data.setup("fit")
        return data

    def initial_features(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return what enters the last layer at the start, of both views of the probe pairs, and that layer's weights.

        Features (n, m) each, centred, and weights (d, m), float64.
        """
        layer, pairs = last_layer(self.module), self.data.probe_pairs()
        h1, h2 = (h[0].double() for h in last_features(self.module, layer, [pairs], len(pairs[0])))
        return h1 - h1.mean(0), h2 - h2.mean(0), layer.weight.detach().double()

    def optimization(self) -> tuple[float, float]:
        """Return its learning rate and momentum."""
        with self._readable("config.yaml"):
            return float(self._config["model"]["learning_rate"]), float(self._config["model"]["momentum"])

    @cached_property
    def module(self) -> JointEmbedding:
        """What was trained, as it was at the start."""
        with self._readable("config.yaml"):
            settings = {name: value for name, value in self._config["model"].items() if name != "encoder"}
            return self.method.module(self.encoder(), **settings)

    @cached_property
    def features(self) -> tuple[Tensor, Tensor]:
        """What enters the last layer at the start, of 4096 training pairs with views that were not trained on.

        In batches of the training size, (batches, n, m) of either view.
        """
        module = self.module.to("cuda" if torch.cuda.is_available() else "cpu")
        return last_features(module, last_layer(module), unseen_batches(self.data), NUM_PAIRS)

    @cached_property
    def forecast(self) -> Forecast:
        """When each mode should be learned, said at the start."""
        return self.forecast_of(*self.features)

    def forecast_of(self, h1: Tensor, h2: Tensor, **changes: Any) -> Forecast:
        """Return a forecast of other features than its own (batches, n, m), or of training that is other than its own.

        ``changes`` are of :class:`stepwise_lightning.forecasts.sgd.SGDSettings`.
        """
        layer, length = last_layer(self.module), int(self.record.steps[-1])
        training = replace(SGDSettings.of(self.module, 0, length), **changes)
        return forecast_of_features(training, h1, h2, layer.weight, bias_of(layer), with_rates=False)

    def panel(self, with_forecast: bool = False) -> Panel:
        """Return how to draw loss and eigenvalues, the steps detected, and perhaps its forecast, as far as it goes."""
        count = self.steps.num_distinct
        theory = None
        if with_forecast:
            values = self.forecast.reliable_eigenvalues(self.record.steps)
            losses = (1 - values).square().sum(1) if self.loss == "barlow_twins" else None
            if values.isfinite().any():  # nothing is promised of modes that start high
                theory = SpectrumRecord.of(self.record.times, values, losses, self.method.matrix, self.record.steps)
        title = f"{self.method.title}: {count} distinct step{'s' * (count != 1)}"
        return Panel(self.record, self.method.matrix, title, theory, step_times=self.steps.step_times)

    def rows(self, others: Mapping[str, Tensor] | None = None) -> list[list[Any]]:
        """Return its rows of ``data.csv``, of ``ROW_COLUMNS``, with other quantities (T, k) by name."""
        return data_rows([self.loss, self.variant, self.seed], self.record, self.method.matrix, others=others)

    def summary(self) -> dict[str, Any]:
        """Return its row in the table."""
        return {
            "loss": self.loss,
            "variant": self.variant,
            "seed": self.seed,
            "modes_learned": int(self.steps.num_learned[-1]),
            "distinct_steps": self.steps.num_distinct,
            "stepwiseness": round(self.steps.stepwiseness, 2),
            "modes_apart": self.rises.num_apart,
            "modes_risen": self.rises.num_modes,
            "separation": round(self.rises.separation, 2),
            "training_steps": int(self.record.steps[-1]),
        }


SMALL_STARTS = [(loss, "small") for loss in METHODS]
ROW_COLUMNS = ["loss", "variant", "seed", "step", "time", "quantity", "mode", "value"]


def trained_runs(options: argparse.Namespace, kinds: Iterable[tuple[str, str]] = SMALL_STARTS) -> list[Run]:
    """Train what is missing (all of it without ``--resume``), as many at once as there are cores; on GPUs, one.

    ``kinds`` are pairs of a loss and a variant; each is trained once for every seed.

    Raises:
        UserError: bad data, or no such launcher; raised before anything is written.
        RunFailedError: a run failed.
        SystemExit: a run was told to stop.

    """
    if not CONFIGS.is_dir():
        raise NotFoundError(f"no configurations in {str(CONFIGS)!r}: run this from a clone of the repository")
    runs = [Run(*kind, seed, options) for seed, kind in product(options.seeds, kinds)]
    if runs[0].launcher and not shutil.which(runs[0].launcher[0]):
        raise UserError(f"no command {runs[0].launcher[0]!r} here to start training with: see --launcher")
    load_image_set(options.data, "val", options.root, options.download)
    missing = [run for run in runs if not (options.resume and run.is_finished())]
    missing.sort(key=lambda run: run.variant in CPU_STEPS)  # a long one begun last would run alone for long
    done = len(runs) - len(missing)
    with tqdm(total=len(runs), initial=done, desc="training networks", unit="run", disable=None) as bar:
        _train(missing, options.resume, bar)
    return runs


def _train(runs: list[Run], resume: bool, bar: tqdm) -> None:
    """Train side by side; where one fails or is told to stop, others end that have not begun."""
    if any(run.is_warm for run in runs):
        warm_up()  # here, where Ctrl-C is heard
    workers = 1 if torch.cuda.is_available() else min(os.cpu_count() or 1, max(len(runs), 1))
    ended = Event()

    def train(run: Run) -> None:
        if ended.is_set():  # the job has to end, or others would fail in the same way
            return
        try:
            run.train(resume)
        except BaseException:
            ended.set()
            raise
        bar.update()
        if bar.disable:  # no terminal: a line now and then
            print(f"trained {run.name}", flush=True)

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(train, run) for run in runs]
        try:
            for future in futures:
                future.result()
        except KeyboardInterrupt:
            ended.set()
            for run in runs:
                run.stop()
            raise
