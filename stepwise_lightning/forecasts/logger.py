"""When the next mode is due, said while training goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import lightning as L

from stepwise_lightning.errors import UserError
from stepwise_lightning.forecasts.forecast import forecast_of_features
from stepwise_lightning.forecasts.result import MATRICES, Forecast
from stepwise_lightning.forecasts.training import Training, bias_of, last_features, last_layer, loss_of, velocity_of
from stepwise_lightning.modules import JointEmbedding
from stepwise_lightning.spectrum.batches import views_in
from stepwise_lightning.spectrum.logger import SpectrumLogger

__all__ = ["ForecastLogger", "LiveForecast"]


class LiveForecast(NamedTuple):
    """What was said at a step of the next mode."""

    step: int
    num_learned: int
    due: float
    """The optimiser step at which the next mode is due; infinite for not before training ends."""


class ForecastLogger(L.Callback):
    """Say while a module trains at which optimiser step its next mode is due.

    A forecast is made of the weights and the optimiser's momentum as they are, on the features of the probe pairs, in
    batches of the training size (:func:`stepwise_lightning.forecasts.forecast.forecast_of_features`): at the start,
    when a mode has just been learned, half-way to the next one, at half of what then remains, and so on, each
    after a measurement of the :class:`stepwise_lightning.SpectrumLogger` that must stand beside it in the Trainer.
    Training is bit-identical with and without it.

    Logged, to every logger: ``forecast/next_mode_step``, at the step at which it was said, if the mode is due before
    training ends. In Lightning's plain progress bar: "mode 4 of 10 learned, next ≈ step 3200".

    Typical errors of the time that remains, of small networks: 20 % for Barlow Twins and SimCLR, 40 % for VICReg.

    Args:
        num_pairs: how many of the probe pairs (of the training batch, where there are none) to use at the most.
        cost: share of training time that forecasts may take. Those that would exceed it wait.
        loss: for a module that is none of this package's, and whose ``forward`` returns the embeddings that its last
            linear layer puts out: ``barlow_twins``, ``vicreg`` or ``simclr``.
        settings: of that loss, named as its arguments.

    Raises:
        UserError: when training starts, there is no SpectrumLogger, or the loss is not known; at the first
            forecast, the module does not end in a linear layer.

    Attributes:
        forecasts: what was said so far, a list of :class:`LiveForecast`.

    """

    def __init__(
        self,
        num_pairs: int = 256,
        cost: float = 0.01,
        loss: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if num_pairs < 2 or not 0 < cost <= 1:
            raise UserError(f"num_pairs must be at least 2 and cost in (0, 1], got {num_pairs} and {cost}")
        self.num_pairs, self.cost, self.loss, self.settings = num_pairs, cost, loss, settings
        self.forecasts: list[LiveForecast] = []
        self._text = ""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find what is measured, and the pairs."""
        spectra = [c for c in trainer.callbacks if isinstance(c, SpectrumLogger)]  # type: ignore[attr-defined]
        if not spectra:
            raise UserError("ForecastLogger needs a SpectrumLogger in the Trainer, whose measurements it goes by")
        self._matrix = MATRICES[self.loss or loss_of(pl_module)]
        self._spectrum = spectra[0]
        pairs = getattr(getattr(trainer, "datamodule", None), "probe_pairs", None)
        self._pairs = None if pairs is None else list(pairs())
        self.forecasts, self._text = [], ""
        self._seen, self._learned, self._next_at = -1, -1, 0.0
        self._began, self._spent = time.perf_counter(), 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep what was said in the progress bar, which forgets it at each epoch."""
        bar = getattr(trainer.progress_bar_callback, "train_progress_bar", None)
        if bar is not None and self._text not in bar.desc:
            bar.set_description(f"Epoch {trainer.current_epoch}, {self._text}", refresh=False)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Make a forecast, if there is a new measurement and one is due."""
        if self._spectrum.last_step == self._seen:
            return
        self._seen = self._spectrum.last_step
        due = trainer.is_global_zero and self._is_due()
        # Batch normalisation of several processes runs on all of them, or not at all.
        if trainer.world_size > 1:
            due = trainer.strategy.broadcast(due)
        end = trainer.estimated_stepping_batches
        if due and trainer.global_step < end < math.inf:
            started = time.perf_counter()
            self._say(trainer, self._forecast(trainer, pl_module, batch, int(end)))
            self._spent += time.perf_counter() - started

    def _is_due(self) -> bool:
        record = self._spectrum.record
        learned = int(record.measure("num_grown", self._matrix)[-1])
        if learned > self._learned:
            self._learned, self._next_at = learned, 0.0
        affordable = self._spent <= self.cost * (time.perf_counter() - self._began)
        return affordable and self._seen >= self._next_at

    def _forecast(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, end: int) -> Forecast:
        step, optimizer = trainer.global_step, trainer.optimizers[0]
        group = {} if isinstance(module, JointEmbedding) else optimizer.param_groups[0]
        options = (group.get(name) for name in ("lr", "momentum", "weight_decay"))
        training = Training.of(module, step, end, self.loss, self.settings, *options)
        layer = last_layer(module)
        size = len(views_in(batch)[0]) * trainer.world_size
        pairs = views_in(batch) if self._pairs is None else self._pairs
        batches = zip(*(view[: self.num_pairs].split(size) for view in pairs), strict=True)
        h1, h2 = last_features(module, layer, batches, self.num_pairs)
        velocity = velocity_of(layer, optimizer)
        return forecast_of_features(training, h1, h2, layer.weight, bias_of(layer), step, velocity, with_rates=False)

    def _say(self, trainer: L.Trainer, forecast: Forecast) -> None:
        mode, due = forecast.next_mode
        step, dim = forecast.start, forecast.eigenvalues.shape[1]
        said = LiveForecast(step, mode - 1, due)
        self.forecasts.append(said)
        remaining = due - step if math.isfinite(due) else step
        self._next_at = step + max(remaining / 2, 0.02 * step)
        coming = f"next ≈ step {due:.0f}" if math.isfinite(due) else "no other before the end"
        self._text = f"mode {mode - 1} of {dim} learned, {coming}"
        if math.isfinite(due):
            for logger in trainer.loggers:
                logger.log_metrics({"forecast/next_mode_step": due}, step=step)
