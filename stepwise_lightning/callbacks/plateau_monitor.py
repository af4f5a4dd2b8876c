"""Warnings of plateaus that last longer than expected, and their causes, during training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from stepwise_lightning.callbacks.clock import expected_end
from stepwise_lightning.callbacks.forecast_logger import ForecastLogger, LiveForecast
from stepwise_lightning.callbacks.spectrum_logger import SpectrumLogger
from stepwise_lightning.callbacks.tensorboard import NAME, PrimaryMatrix
from stepwise_lightning.errors import UserError
from stepwise_lightning.features import views_in
from stepwise_lightning.forecasts.diagnose import diagnose
from stepwise_lightning.forecasts.diagnosis import Diagnosis
from stepwise_lightning.forecasts.run_state import RunState, find_verdict, known_saddle_value, run_state
from stepwise_lightning.forecasts.sgd import SGDSettings
from stepwise_lightning.modules import JointEmbedding
from stepwise_lightning.spectrum.matrices import phrase

_NUM_PAIRS = 1024
_MIN_STEPS = 100  # of a plateau before a warning
# Duration of a plateau, relative to the forecast: the first mode is forecast within some percent.
_FIRST_RATIO, _LATER_RATIO = 1.5, 3.0
_MIN_SHARE = 0.1  # of training, without a forecast


def expected_step(steps: Tensor, forecasts: Sequence[LiveForecast], state: RunState) -> float:
    """Return the step at which the next mode is expected, NaN without a forecast on this plateau.

    The first forecast counts, because later ones of an overdue mode are later. Forecasts that precede the last
    measurement with another number of learned modes belong to an earlier plateau, and are ignored: the number
    fluctuates if eigenvalues fall below the threshold again.

    Args:
        steps: measured steps, (T,).
        forecasts: in the order of their steps.
        state: state at the last measurement.

    """
    before = max((int(step) for step in steps if step < state.since), default=-1)
    current = [each for each in forecasts if each.step > before and each.num_learned == state.num_learned]
    return current[0].expected_step if current else math.nan


class PlateauMonitor(L.Callback):
    """Warn when a plateau lasts longer than expected, and report its cause.

    The callback needs a :class:`stepwise_lightning.SpectrumLogger` in the same Trainer. With a
    :class:`stepwise_lightning.ForecastLogger`, a plateau is too long after 1.5 times the forecast duration before the
    first mode, and three times later. Otherwise it is too long if the record shows that the first mode does not grow,
    or not before training ends, after a tenth of training. Then the cause is determined from 1024 training pairs as by
    :func:`stepwise_lightning.diagnose`; in training with several processes the warning gives the command instead.
    Training is bit-identical with and without this callback.

    Without a forecast, a loss given as a function is on its first plateau while it is within 2 % of its saddle value,
    in training with one process. For other modules the first plateau is not known before an eigenvalue has grown
    a hundredfold: if none grows, there is no warning.

    At each measurement ``plateau/level`` is logged to every logger: 0 while the run learns, 1 on a plateau that is too
    long, 2 once its cause is known. Each plateau is warned of once.

    Raises:
        UserError: when training starts, the Trainer has no SpectrumLogger.

    Attributes:
        diagnosis: the last :class:`stepwise_lightning.Diagnosis` with features of the network, or None.

    """

    def __init__(self) -> None:
        self.diagnosis: Diagnosis | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the SpectrumLogger."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        spectra = [callback for callback in callbacks if isinstance(callback, SpectrumLogger)]
        if not spectra:
            raise UserError("PlateauMonitor needs a SpectrumLogger in the Trainer: add one")
        self._spectrum, self.diagnosis = spectra[0], None
        self._forecasts = [callback for callback in callbacks if isinstance(callback, ForecastLogger)]
        self._num_checked, self._level = 0, 0
        self._saddle_value: float | None = None  # computed once
        self._warned: set[int] = set()  # numbers of learned modes
        self._batches: list[Any] | None = None  # while they are collected

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Collect training batches after a warning, and diagnose when there are enough."""
        if self._batches is None:
            return
        self._batches.append(batch)
        size = len(views_in(batch, self._spectrum.views)[0])
        if size * len(self._batches) >= _NUM_PAIRS:
            self._diagnose(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check a new measurement."""
        record = self._spectrum.record  # empty on all ranks but the first
        if len(record) in (0, self._num_checked):
            return
        self._num_checked = len(record)
        if len(record) < 2:
            return
        matrix = PrimaryMatrix.of(pl_module, record.matrices).matrix
        state = run_state(record, matrix, *self._settings(pl_module))
        reading = self._reading(trainer, pl_module, batch, state)
        if not reading:
            self._level, self._batches = 0, None
        elif state.num_learned not in self._warned:
            self._warned.add(state.num_learned)
            self._level = max(self._level, 1)
            alone = trainer.world_size == 1
            remedy = "" if alone else f": run stepwise diagnose {self._spectrum.directory}"
            rank_zero_warn(f"step {state.step}, {phrase(matrix)}: {reading}{remedy}")
            self._batches = [] if alone else None
        prefix = "" if self._spectrum.name == NAME else f"{self._spectrum.name}/"
        for logger in trainer.loggers:
            logger.log_metrics({f"{prefix}plateau/level": float(self._level)}, step=state.step)

    @staticmethod
    def _settings(module: L.LightningModule) -> tuple[str | None, dict[str, Any]]:
        """Return the name and the settings of the module's loss, None and nothing for another loss."""
        if isinstance(module, JointEmbedding) and module.loss_name is not None and module.trains_with_sgd:
            return module.loss_name, SGDSettings.of(module, 0, 1).settings
        return None, {}

    def _saddle(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, matrix: str) -> float:
        """Return the saddle value of a loss given as a function, NaN if unknown."""
        if self._saddle_value is None:
            self._saddle_value = math.nan
            alone = trainer.world_size == 1  # the function may communicate
            if alone and isinstance(module, JointEmbedding) and module.loss_function and module.trains_with_sgd:
                sizes = {"num_pairs": len(batch[0]), "dim": self._spectrum.record.eigenvalues(matrix).shape[1]}
                self._saddle_value = known_saddle_value(module.loss, sizes)[0]
        return self._saddle_value

    def _reading(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, state: RunState) -> str:
        """Return the numbers that show a plateau to be too long, or an empty string."""
        modes = f"{state.num_learned or 'no'} mode{'s' if state.num_learned > 1 else ''} learned"
        forecasts = self._forecasts[0].forecasts if self._forecasts else []
        expected = expected_step(self._spectrum.record.steps, forecasts, state)
        length = state.step - state.since
        if length < _MIN_STEPS or state.num_learned >= state.num_modes:
            return ""
        if math.isfinite(expected):
            ratio = _LATER_RATIO if state.num_learned else _FIRST_RATIO
            if length <= ratio * (expected - state.since):
                return ""
            return f"{modes} since step {state.since}; the next one was expected at about step {expected:.0f}"
        end = expected_end(trainer)
        max_steps = int(end) if math.isfinite(end) else None
        if max_steps is not None and state.step < _MIN_SHARE * max_steps:
            return ""
        saddle = self._saddle(trainer, module, batch, state.matrix)
        verdict, _ = find_verdict(self._spectrum.record, state, saddle, max_steps)
        return f"{modes} since step {state.since}, and none is expected before training ends" * (verdict == "stuck")

    def _diagnose(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        batches, self._batches = self._batches, None
        end = expected_end(trainer)
        self.diagnosis = result = diagnose(
            self._spectrum.record, module, batches, start=trainer.global_step, precision=str(trainer.precision),
            max_steps=int(end) if math.isfinite(end) else None, views=self._spectrum.views,
            num_feature_pairs=_NUM_PAIRS,
        )  # fmt: skip
        if result.cause and result.verdict == "stuck":
            self._level = 2
            rank_zero_warn(f"step {trainer.global_step}: {result.cause} ({result.evidence}): {result.remedy}")
