"""Warnings of a collapse during training."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from stepwise_lightning.callbacks.spectrum_logger import SpectrumLogger
from stepwise_lightning.callbacks.tensorboard import NAME, PrimaryMatrix
from stepwise_lightning.errors import UserError, warn_deprecated
from stepwise_lightning.spectrum.collapses import Collapse, find_collapse

_NORMALISED = "normalized_covariance"
# Values of the scalar collapse/level.
LEVELS = {"": 0, "a mode has died": 1, "dimensional collapse": 2, "complete collapse": 3}


class CollapseMonitor(L.Callback):
    """Warn when an embedding collapses during training.

    The callback needs a :class:`stepwise_lightning.SpectrumLogger` in the same Trainer. It checks the module's
    ``driven_matrix`` if it was measured, else the first matrix. A
    :class:`stepwise_lightning.ForecastLogger` supplies the expected time of the next mode.
    :func:`stepwise_lightning.spectrum.collapses.find_collapse` defines a collapse.

    At each measurement ``collapse/level`` is logged to every logger: 0 for no collapse, 1 for a lost mode, 2 for a
    dimensional collapse, 3 for a complete collapse. Each kind is warned of once per run.

    Raises:
        UserError: when training starts, the Trainer has no SpectrumLogger.

    Attributes:
        found: result of the last check, a :class:`Collapse`.

    """

    def __init__(self) -> None:
        self.found = Collapse("", "")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the SpectrumLogger."""
        spectra = [c for c in trainer.callbacks if isinstance(c, SpectrumLogger)]  # type: ignore[attr-defined]
        if not spectra:
            raise UserError("CollapseMonitor needs a SpectrumLogger in the Trainer: add one")
        self._spectrum, self._num_checked, self._warned = spectra[0], 0, {""}
        self.found = Collapse("", "")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check a new measurement."""
        record = self._spectrum.record  # empty on all ranks but the first
        if len(record) in (0, self._num_checked):
            return
        self._num_checked = len(record)
        matrix = PrimaryMatrix.of(pl_module, record.matrices).matrix
        self.found = find_collapse(record, matrix)
        if matrix == "tangent_covariance" and _NORMALISED in record.matrices:  # it does not vanish in a collapse
            complete = find_collapse(record, _NORMALISED)
            if complete.kind == "complete collapse":
                self.found, matrix = complete, _NORMALISED
        step, prefix = int(record.steps[-1]), "" if self._spectrum.name == NAME else f"{self._spectrum.name}/"
        for logger in trainer.loggers:
            logger.log_metrics({f"{prefix}collapse/level": float(LEVELS[self.found.kind])}, step=step)
        if self.found.kind not in self._warned:
            self._warned.add(self.found.kind)
            rank_zero_warn(f"step {step}, {matrix}: {self.found.kind}: {self.found.reading}")


class CollapseWatch(CollapseMonitor):
    """Former name of :class:`CollapseMonitor`; deprecated."""

    def __init__(self) -> None:
        warn_deprecated("CollapseWatch", alternative="CollapseMonitor", removed_in="0.4")
        super().__init__()
