"""Live forecasts of the step at which the next mode is learned."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.distributed.tensor import DTensor

from stepwise_lightning.callbacks.progress import LineProgress, describe_bar
from stepwise_lightning.callbacks.spectrum_logger import SpectrumLogger
from stepwise_lightning.callbacks.tensorboard import overview_tag
from stepwise_lightning.errors import UserError, reason
from stepwise_lightning.features import views_in
from stepwise_lightning.features.module_state import is_compiled, restored_state
from stepwise_lightning.forecasts.forecast import Forecast
from stepwise_lightning.forecasts.sgd import SGDSettings, batched_features, last_layer, loss_of, velocity_of
from stepwise_lightning.forecasts.simulate import NUM_PAIRS, forecast_of_features
from stepwise_lightning.losses import LOSSES
from stepwise_lightning.modules import JointEmbedding
from stepwise_lightning.theory.loss_signature import loss_properties

_KEY = "stepwise_lightning_forecasts"  # in a checkpoint
_NUM_POINTS = 60  # step times are interpolated between them; for SimCLR they take longer than the steps
_MIN_INTERVAL = 0.02  # between two forecasts, as a share of the steps so far


class LiveForecast(NamedTuple):
    """Forecast of the next mode at a step."""

    step: int
    num_learned: int
    expected_step: float
    """Optimiser step at which the next mode is expected; infinite if not before training ends."""


class ForecastLogger(L.Callback):
    """Forecast during training the optimiser step at which the next mode is learned.

    Requires a :class:`stepwise_lightning.SpectrumLogger` in the Trainer. The last linear layer is simulated to the end
    of training (:func:`stepwise_lightning.forecasts.simulate.forecast_of_features`) from its current weights and
    momentum, on its inputs during the measurements of the SpectrumLogger; for SimCLR and losses given as functions,
    which a few pairs would bias, on its inputs for the last 4096 training pairs. There are no additional forward
    passes. Forecasts are made at the start, whenever a mode has been learned, and each time half of the remaining steps
    have passed. Feature learning is corrected for (:meth:`stepwise_lightning.Forecast.with_plateau_correction`).
    Training is bit-identical with and without this callback.

    Logged, to every logger: ``forecast/next_mode_step`` at the step of the forecast, if a mode is expected before
    training ends, and ``At a glance/num_learned`` at each measurement. Progress shows "4 of 10 modes learned, next at
    about step 3200"; modes above the threshold of the last forecast count as learned. The first forecast is printed as
    a line. Figures of trajectories mark the first forecast of each mode. There is no forecast without SGD on the
    gradient of the loss, or if the loss cannot be simulated; one line reports why.

    Typical errors of the remaining time, for small networks: 8 to 43 % for Barlow Twins and SimCLR; up to twofold too
    long for VICReg. Errors of other losses were not measured.

    Args:
        cost: maximal share of training time spent on forecasts; forecasts that would exceed it are postponed.
        loss: loss of a module of another package whose ``forward`` returns the output of its last linear layer: a name
            in ``stepwise_lightning.losses.LOSSES``, or a function of both views' embeddings.
        settings: arguments of a named loss.

    Raises:
        UserError: when training starts, an unknown loss, or no SpectrumLogger that measures the driven matrix.

    Attributes:
        forecasts: list of :class:`LiveForecast`.
        threshold: θ of the last forecast, above which modes count as learned; infinite before the first one.

    """

    def __init__(
        self,
        cost: float = 0.01,
        loss: Callable[[Tensor, Tensor], Tensor] | str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if not 0 < cost <= 1:
            raise UserError(f"cost must be above 0 and at most 1, got {cost}")
        self.cost, self.loss, self.settings = cost, loss, settings
        self.forecasts: list[LiveForecast] = []
        self._marks: dict[int, float] = {}  # time of the first forecast of each mode
        self._restored: dict[str, dict[int, float]] = {}
        self._text = ""
        self._diverges = False  # in the last forecast
        self._hook: Any = None
        self.threshold = math.inf

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the forecasts that figures mark."""
        if self._marks:
            checkpoint.setdefault(_KEY, {})[self._matrix] = dict(self._marks)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the marks of a checkpoint until training starts."""
        self._restored = checkpoint.get(_KEY, {}) if trainer.state.fn == "fit" else {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Register a hook on the last layer."""
        self.forecasts, self._text, self._marks, self.threshold = [], "", {}, math.inf
        self._remove_hook()
        if self.loss is None and not isinstance(pl_module, JointEmbedding):
            rank_zero_info(
                f"no forecast of the next mode: {type(pl_module).__name__} has no loss of this package; set "
                f"ForecastLogger(loss=…) or --forecast.loss to a function, or one of {', '.join(LOSSES)}"
            )
            return
        loss = loss_of(pl_module) if self.loss is None else self.loss
        properties = loss_properties(loss)
        self._matrix = (
            not isinstance(loss, str) and getattr(pl_module, "driven_matrix", None)
        ) or properties.driven_matrix
        self._marks, self._restored = dict(self._restored.get(self._matrix, {})), {}
        self._spectrum = _find_spectrum_logger(trainer, self._matrix)
        if not _trains_with_sgd(trainer, pl_module):
            rank_zero_info("no forecast of the next mode: forecasts assume SGD on the gradient of the loss")
            return
        self._measurements, self._learned, self._next_at = -1, 0, 0.0
        self._began, self._spent = time.perf_counter(), 0.0
        self._measured: list[Tensor] = []
        self._trained: deque[Tensor] = deque()
        layer = last_layer(pl_module)
        if isinstance(layer.weight, DTensor):
            rank_zero_info("no forecast of the next mode: the weights of the last layer are sharded")
            return
        # Other modules may pass both views in one call, so their training batches are not used.
        batches = not properties.uses_moments and isinstance(pl_module, JointEmbedding)

        def record(_: Any, args: tuple[Tensor, ...]) -> None:
            if layer.training:
                if batches:
                    self._record_training(args[0].detach())
            elif len(self._measured) < 2:  # the measurement precedes evaluations
                self._measured.append(args[0].detach())

        # A compiled hook that records batches would be compiled again for each number of batches.
        hook = torch.compiler.disable(record) if batches and is_compiled(pl_module) else record
        self._hook = layer.register_forward_pre_hook(hook)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Show the forecast in the progress bar, which Lightning resets at each epoch."""
        if self._hook is None:
            return
        self._measured.clear()
        progress = trainer.progress_bar_callback
        if isinstance(progress, LineProgress):
            progress.note = self._text
        elif self._text:
            describe_bar(progress, f"Epoch {trainer.current_epoch}, {self._text}")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Make a forecast after a new measurement, if one is scheduled."""
        if self._hook is None:
            return
        record = self._spectrum.record  # empty except on rank 0
        if len(record) in (0, self._measurements):
            return
        self._measurements = len(record)
        self._show_marks()
        end, step = trainer.estimated_stepping_batches, trainer.global_step
        if self._is_scheduled(step) and step < end < math.inf and len(self._measured) >= 2:
            started = time.perf_counter()
            size = len(views_in(batch, self._spectrum.views)[0]) * trainer.world_size
            try:
                result = self._forecast(pl_module, trainer.optimizers[0], size, step, int(end))
            except Exception as error:  # a user's loss may raise any error on float64 embeddings on a CPU
                if isinstance(self.loss or loss_of(pl_module), str):
                    raise
                rank_zero_info(f"no forecast of the next mode: the loss cannot be simulated ({reason(error)})")
                self._remove_hook()
                return
            self._log(trainer, *result)
            self._spent += time.perf_counter() - started
        self._measured.clear()
        self._text = self._summary(step)
        for logger in trainer.loggers if self.forecasts else ():
            count = {overview_tag("num_learned", self._spectrum.name): float(self._num_learned())}
            logger.log_metrics(count, step=int(record.steps[-1]))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove the hook."""
        self._remove_hook()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Remove the hook."""
        self._remove_hook()

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _record_training(self, view: Tensor) -> None:
        """Keep a view of the last batches of equal size, without the smaller last batch of an epoch."""
        views = self._trained
        if views and len(view) < len(views[-1]):
            return
        if views and len(view) > len(views[-1]):
            views.clear()
        views.append(view)
        while len(views) > 2 * math.ceil(NUM_PAIRS / len(view)):
            views.popleft()

    def _is_scheduled(self, step: int) -> bool:
        if (learned := self._num_learned()) > self._learned:
            self._learned, self._next_at = learned, 0.0
        return step >= self._next_at and self._spent <= self.cost * (time.perf_counter() - self._began)

    def _num_learned(self) -> int:
        """Return the number of measured eigenvalues above θ of the last forecast, 0 before the first forecast."""
        return int((self._spectrum.record.eigenvalues(self._matrix)[-1] > self.threshold).sum())

    def _forecast(
        self, module: L.LightningModule, optimizer: torch.optim.Optimizer, size: int, start: int, end: int
    ) -> tuple[Forecast, Tensor]:
        group = {} if isinstance(module, JointEmbedding) else optimizer.param_groups[0]
        options = [group.get(name) for name in ("lr", "momentum", "weight_decay")]
        sgd = SGDSettings.of(module, start, end, self.loss, self.settings, *options)
        layer = last_layer(module)
        is_named = isinstance(sgd.loss, str)
        h1, h2 = self._features(None if loss_properties(sgd.loss).uses_moments else size, of_rank=is_named)
        velocity = velocity_of(layer, optimizer)
        # To the end, even if the next mode is near: the last plateau defines the threshold.
        with nullcontext() if is_named else restored_state(module):
            result = forecast_of_features(
                sgd, h1, h2, layer.weight, layer.bias, start, velocity, with_rates=False, num_points=_NUM_POINTS
            )
        return result, sgd.rates

    def _features(self, size: int | None, of_rank: bool = False) -> tuple[Tensor, Tensor]:
        return batched_features(list(self._trained), self._measured, size, of_rank)

    def _summary(self, step: int) -> str:
        """Return the text for the progress bar; without a forecast if a mode was learned since the last one."""
        if not self.forecasts:
            return ""
        last = self.forecasts[-1]
        count, dim = max(self._learned, last.num_learned), self._spectrum.record.eigenvalues(self._matrix).shape[1]
        text = f"{count} of {dim} modes learned"
        if last.num_learned < count:
            return text
        if self._diverges:
            return f"{text}, training is expected to diverge: lower the learning rate"
        if not math.isfinite(last.expected_step):
            return f"{text}, no other expected"
        due = f"at about step {last.expected_step:.0f}" if last.expected_step > step else "overdue"
        return f"{text}, next {due}"

    def _log(self, trainer: L.Trainer, forecast: Forecast, rates: Tensor) -> None:
        step, (mode, expected) = forecast.start, forecast.with_plateau_correction(self._spectrum.record).next_mode
        soon, first = math.isfinite(expected), not self.forecasts
        if soon and mode not in {earlier.num_learned + 1 for earlier in self.forecasts} | self._marks.keys():
            self._marks[mode] = self._time(step, expected, rates)
            self._show_marks()
        self.forecasts.append(LiveForecast(step, mode - 1, expected))
        self._diverges = not bool(forecast.eigenvalues.isfinite().all())
        self.threshold = forecast.threshold if forecast.threshold > 0 else math.inf
        self._learned = max(self._learned, self._num_learned())
        self._next_at = step + max(((expected - step) if soon else step) / 2, _MIN_INTERVAL * step)
        if soon:
            for logger in trainer.loggers:
                logger.log_metrics({"forecast/next_mode_step": expected}, step=step)
        if first and (progress := trainer.progress_bar_callback) is not None:
            progress.print(f"forecast: {self._summary(step)}")

    def _time(self, step: int, expected: float, rates: Tensor) -> float:
        """Return the expected time of the next mode, the sum of learning rates up to its step."""
        record, steps = self._spectrum.record, int(expected) - step
        # The last measurement precedes the step just taken; the last rate covers a part of a step.
        ahead = [(step - record.steps[-1]) * rates[0], *rates[:steps], expected % 1 * rates[steps - 1]]
        return float(record.times[-1] + sum(ahead))

    def _show_marks(self) -> None:
        """Add the marks to the record, which figures and the CollapseMonitor read."""
        if self._marks:
            self._spectrum.record.expected_times[self._matrix] = list(self._marks.values())


def _find_spectrum_logger(trainer: L.Trainer, matrix: str) -> SpectrumLogger:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SpectrumLogger) and matrix in callback.matrices and callback.output:
            return callback
    raise UserError(f"ForecastLogger needs a SpectrumLogger in the Trainer that measures {matrix}: add it to matrices")


def _trains_with_sgd(trainer: L.Trainer, module: L.LightningModule) -> bool:
    sgd = bool(trainer.optimizers) and isinstance(trainer.optimizers[0], torch.optim.SGD)
    return sgd and getattr(module, "trains_with_sgd", True)
