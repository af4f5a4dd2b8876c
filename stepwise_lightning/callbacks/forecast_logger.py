"""When the next mode is due, said while training goes on."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from stepwise_lightning.callbacks.progress import LineProgress
from stepwise_lightning.callbacks.spectrum_logger import SpectrumLogger
from stepwise_lightning.encoders import bias_of
from stepwise_lightning.errors import UserError
from stepwise_lightning.features import views_in
from stepwise_lightning.forecasts.forecast import Forecast
from stepwise_lightning.forecasts.sgd import SGDSettings, last_layer, loss_of, velocity_of
from stepwise_lightning.forecasts.simulate import NUM_PAIRS, forecast_of_features
from stepwise_lightning.losses import LOSSES
from stepwise_lightning.modules import JointEmbedding, SimCLR

__all__ = ["ForecastLogger", "LiveForecast"]

_NUM_POINTS = 60  # a step is interpolated between them; of SimCLR they cost more than the steps
_APART = 0.02  # of the steps so far, between two forecasts


class LiveForecast(NamedTuple):
    """What was said at a step of the next mode."""

    step: int
    num_learned: int
    expected_step: float
    """The optimiser step at which the next mode is due; infinite for not before training ends."""


def _trains_with_sgd(trainer: L.Trainer, module: L.LightningModule) -> bool:
    sgd = bool(trainer.optimizers) and isinstance(trainer.optimizers[0], torch.optim.SGD)
    return sgd and getattr(module, "trains_with_sgd", True)


class ForecastLogger(L.Callback):
    """Say while a module trains at which optimiser step its next mode is due.

    It goes by the measurements of the :class:`stepwise_lightning.SpectrumLogger` that must stand beside it in the
    Trainer, and takes what enters the last linear layer in them, or for SimCLR, which overrates what a few pairs share,
    in the last training batches, as many as have 4096 pairs: nothing is run twice. From there, with the layer's
    weights and the optimiser's momentum as they are, training of that layer is simulated to the end
    (:func:`stepwise_lightning.forecasts.simulate.forecast_of_features`): at the start, when a mode has just been
    learned, half-way to the next one, at half of what then remains, and so on. That features move, which shortens what
    remains, is corrected for (:meth:`stepwise_lightning.Forecast.with_plateau_correction`). Training is bit-identical
    with and without it.

    Logged, to every logger: ``forecast/next_mode_step``, at the step at which it was said, if the mode is due before
    training ends. Progress says "4 of 10 modes learned, next ≈ step 3200", and the first forecast is a line of its own.
    In pictures of trajectories the first one of each mode is marked. Without SGD, or with an acceleration, nothing is
    said.

    Typical errors of the time that remains, of small networks: 8 to 43 % for Barlow Twins and SimCLR; for VICReg it is
    overrated, up to twofold.

    Args:
        cost: share of training time that forecasts may take. Those that would exceed it wait.
        loss: for a module that is none of this package's, and whose ``forward`` returns the embeddings that its last
            linear layer puts out: ``barlow_twins``, ``vicreg`` or ``simclr``.
        settings: of that loss, named as its arguments.

    Raises:
        UserError: when training starts, the loss is not known, or there is no SpectrumLogger that measures its matrix.

    Attributes:
        forecasts: what was said so far, a list of :class:`LiveForecast`.

    """

    def __init__(self, cost: float = 0.01, loss: str | None = None, settings: Mapping[str, Any] | None = None) -> None:
        if not 0 < cost <= 1:
            raise UserError(f"cost must be above 0 and at most 1, got {cost}")
        self.cost, self.loss, self.settings = cost, loss, settings
        self.forecasts: list[LiveForecast] = []
        self._text = ""
        self._hook: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to listen to what enters the last layer when spectra are measured."""
        spectra = [c for c in trainer.callbacks if isinstance(c, SpectrumLogger)]  # type: ignore[attr-defined]
        self._matrix = LOSSES[self.loss or loss_of(pl_module)].driven_matrix
        if not any(self._matrix in spectrum.matrices and spectrum.output for spectrum in spectra):
            raise UserError(
                f"ForecastLogger needs a SpectrumLogger in the Trainer that measures {self._matrix}: add it to matrices"
            )
        self._spectrum = next(spectrum for spectrum in spectra if self._matrix in spectrum.matrices and spectrum.output)
        self.forecasts, self._text = [], ""
        self._stop()
        if not _trains_with_sgd(trainer, pl_module):
            rank_zero_info("no forecast of the next mode: forecasts assume SGD on the gradient of the loss")
            return
        self._measurements, self._learned, self._next_at = -1, -1, 0.0
        self._began, self._spent = time.perf_counter(), 0.0
        self._entered: list[Tensor] = []
        self._trained_on: deque[Tensor] = deque()
        layer = last_layer(pl_module)
        # Of other modules it is not known how views enter: perhaps both at once.
        batches = isinstance(pl_module, SimCLR)

        def keep(_: Any, given: tuple[Tensor, ...]) -> None:
            if layer.training:
                if batches:
                    self._keep_trained_on(given[0].detach())
            elif len(self._entered) < 2:  # the measurement; evaluations come after
                self._entered.append(given[0].detach())

        self._hook = layer.register_forward_pre_hook(keep)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep what was said in the progress bar, which forgets it at each epoch."""
        if self._hook is None:
            return
        self._entered.clear()
        progress = trainer.progress_bar_callback
        bar = getattr(progress, "train_progress_bar", None)
        if isinstance(progress, LineProgress):
            progress.note = self._text
        elif self._text and bar is not None and self._text not in bar.desc:
            bar.set_description(f"Epoch {trainer.current_epoch}, {self._text}", refresh=False)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Make a forecast, if there is a new measurement and one is due."""
        if self._hook is None:
            return
        record = self._spectrum.record  # empty but in the first process
        if len(record) in (0, self._measurements):
            return
        self._measurements = len(record)
        end, step = trainer.estimated_stepping_batches, trainer.global_step
        if self._is_due(step) and step < end < math.inf and len(self._entered) >= 2:
            started = time.perf_counter()
            size = len(views_in(batch, self._spectrum.views)[0]) * trainer.world_size
            self._say(trainer, *self._forecast(pl_module, trainer.optimizers[0], size, step, int(end)))
            self._spent += time.perf_counter() - started
        self._entered.clear()
        self._text = self._told(step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen no more."""
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Listen no more."""
        self._stop()

    def _stop(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _keep_trained_on(self, view: Tensor) -> None:
        """Keep a view of the last batches, all of one size: without the rest of an epoch, which may be smaller."""
        kept = self._trained_on
        if kept and len(view) < len(kept[-1]):
            return
        if kept and len(view) > len(kept[-1]):
            kept.clear()
        kept.append(view)
        while len(kept) > 2 * math.ceil(NUM_PAIRS / len(view)):
            kept.popleft()

    def _is_due(self, step: int) -> bool:
        learned = int(self._spectrum.record.measure("num_grown", self._matrix)[-1])
        if learned > self._learned:
            self._learned, self._next_at = learned, 0.0
        return step >= self._next_at and self._spent <= self.cost * (time.perf_counter() - self._began)

    def _forecast(
        self, module: L.LightningModule, optimizer: torch.optim.Optimizer, size: int, start: int, end: int
    ) -> tuple[Forecast, Tensor]:
        group = {} if isinstance(module, JointEmbedding) else optimizer.param_groups[0]
        options = [group.get(name) for name in ("lr", "momentum", "weight_decay")]
        training = SGDSettings.of(module, start, end, self.loss, self.settings, *options)
        layer = last_layer(module)
        h1, h2 = self._features(size if training.loss == "simclr" else None)
        velocity = velocity_of(layer, optimizer)
        # To the end, though the next mode may be due soon: there is the plateau by which modes are called learned.
        result = forecast_of_features(
            training, h1, h2, layer.weight, bias_of(layer), start, velocity, with_rates=False, num_points=_NUM_POINTS
        )
        return result, training.rates

    def _features(self, size: int | None) -> tuple[Tensor, Tensor]:
        """Return the features to go by, (batches, n, m); of the measured pairs in batches of a size, if it matters."""
        seen = list(self._trained_on)
        if len(seen) >= 4 and len(seen) % 2 == 0 and len({view.shape for view in seen}) == 1:
            stacked = torch.stack(seen).flatten(2).cpu()
            return stacked[::2], stacked[1::2]
        h1, h2 = (h.flatten(1).cpu() for h in self._entered[:2])
        size = min(size or len(h1), len(h1))
        h1, h2 = (h[: len(h) // size * size].unflatten(0, (-1, size)) for h in (h1, h2))
        return h1, h2

    def _told(self, step: int) -> str:
        """Return what is known now: of a mode that has come since the last forecast, only that."""
        if not self.forecasts:
            return ""
        said = self.forecasts[-1]
        count, dim = max(self._learned, said.num_learned), self._spectrum.record.eigenvalues(self._matrix).shape[1]
        text = f"{count} of {dim} modes learned"
        if said.num_learned < count:
            return text
        if not math.isfinite(said.expected_step):
            return f"{text}, no other is due"
        return (
            f"{text}, next ≈ step {said.expected_step:.0f}" if said.expected_step > step else f"{text}, next is overdue"
        )

    def _say(self, trainer: L.Trainer, forecast: Forecast, rates: Tensor) -> None:
        step, (mode, due) = forecast.start, forecast.with_plateau_correction(self._spectrum.record).next_mode
        soon, first = math.isfinite(due), not self.forecasts
        if soon and mode not in {said.num_learned + 1 for said in self.forecasts}:
            record = self._spectrum.record
            # From the measurement on, made before the step just taken; the last rate is that of a step begun.
            ahead = [
                (step - record.steps[-1]) * rates[0],
                *rates[: int(due) - step],
                due % 1 * rates[int(due) - step - 1],
            ]
            record.expected_times.setdefault(self._matrix, []).append(float(record.times[-1] + sum(ahead)))
        self.forecasts.append(LiveForecast(step, mode - 1, due))
        self._next_at = step + max(((due - step) if soon else step) / 2, _APART * step)
        if soon:
            for logger in trainer.loggers:
                logger.log_metrics({"forecast/next_mode_step": due}, step=step)
        if first and (progress := trainer.progress_bar_callback) is not None:
            progress.print(f"forecast: {self._told(step)}")
