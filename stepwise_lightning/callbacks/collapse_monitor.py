"""What practitioners fear, said while a run goes on: an embedding that collapses, wholly or to a few dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from stepwise_lightning.callbacks.spectrum_logger import SpectrumLogger
from stepwise_lightning.callbacks.tensorboard import NAME, Lead
from stepwise_lightning.errors import UserError
from stepwise_lightning.spectrum.measures import effective_rank
from stepwise_lightning.spectrum.record import SpectrumRecord

__all__ = ["Collapse", "CollapseWatch", "find_collapse"]

_SUSTAINED = 3  # measurements, as for steps
_GONE = 0.01  # of the largest that it was
_LARGE = 0.1  # of the largest now: what counts as a dimension
_LEAST = 200  # steps that it must last
_LONG = 10  # times as many steps as when the last dimension was gained, where there is no forecast
_OVERDUE = 3  # times as long as was forecast
_GROWS = 2  # times as large since the middle of a plateau, on the logarithmic scale of measurements
_NORMALISED = "normalized_covariance"
# What the scalar says.
LEVELS = {"": 0, "a mode has died": 1, "dimensional collapse": 2, "complete collapse": 3}


class Collapse(NamedTuple):
    """What :func:`find_collapse` found."""

    kind: str
    """``complete collapse``, ``dimensional collapse``, ``a mode has died``, or '' for none."""
    reading: str
    """The numbers that say so."""


def find_collapse(record: SpectrumRecord, matrix: str = "cross_correlation", due: Sequence[float] = ()) -> Collapse:
    """Judge from what was measured so far whether an embedding has collapsed.

    The worst of these that is true of the last three measurements:

    - **complete collapse**: all eigenvalues are below 1 % of the largest that there ever was.
    - **dimensional collapse**: fewer than half of the eigenvalues are above a tenth of the largest, their number stands
      still, and neither they nor the next one grow: none has doubled since the middle of this plateau, in measurements.
      That has to last 200 steps, and three times as long as a forecast gave the next mode, or, where there is none,
      until there are ten times as many steps as when it began. On the plateaus of a staircase the next mode grows all
      the time; and before anything has grown, or shrunk, nothing is said.
    - **a mode has died**: an eigenvalue that had grown (``num_grown``) is below 1 % of the largest that it was.

    Args:
        record: of a run, perhaps one that goes on.
        matrix: whose eigenvalues to judge.
        due: times (learning rate × steps) at which modes were forecast to be learned.

    Raises:
        ValueError: that matrix was not measured.

    """
    values = record.eigenvalues(matrix)
    known = values.isfinite().all(1)
    values, steps, times = values[known].clamp(min=0), record.steps[known], record.times[known]
    if len(values) <= _SUSTAINED or not values.any():
        return Collapse("", "")
    largest = values[:, 0]
    if (largest[-_SUSTAINED:] < _GONE * largest.max()).all():
        return Collapse("complete collapse", f"the largest eigenvalue is {_ratio(largest[-1], largest.max())} it was")
    counts = (values > _LARGE * largest[:, None]).sum(1)
    count, dim = int(counts[-1]), values.shape[1]
    changed = (counts != count).nonzero()
    begin = int(changed[-1]) + 1 if len(changed) else 0
    plateau = values[(begin + len(values) - 1) // 2 :, : count + 1]  # its second half
    began = max(int(steps[begin]), 1)
    expected = [time for time in due if time > times[begin]]
    long = times[-1] > times[begin] + _OVERDUE * (min(expected) - times[begin]) if expected else True
    long &= bool(steps[-1] >= max(1 if expected else _LONG * began, began + _LEAST))
    stands = (plateau[-_SUSTAINED:].max(0).values <= _GROWS * plateau[0]).all()
    grown = int(record.measure("num_grown", matrix)[known].nan_to_num(0.0).max())  # NaN: of another size than at first
    happened = grown or count < counts[0]  # at the start of a run, everything stands still
    if count < dim / 2 and happened and long and stands and len(values) - begin > 2 * _SUSTAINED:
        rank = float(effective_rank(values[-1]))
        return Collapse(
            "dimensional collapse",
            f"{count} of {dim} eigenvalues {'is' if count == 1 else 'are'} above a tenth of the largest since step "
            f"{int(steps[begin])}, and the next one does not grow; effective rank {rank:.2f}",
        )
    peaks = values[:, :grown].max(0).values
    dead = (values[-_SUSTAINED:, :grown] < _GONE * peaks).all(0)
    if dead.any():
        mode = int(dead.nonzero()[0])
        now = f"eigenvalue {mode + 1} is {_ratio(values[-1, mode], peaks[mode])} it was"
        return Collapse("a mode has died", now)
    return Collapse("", "")


def _ratio(value: Any, peak: Any) -> str:
    share = float(value / peak)
    return f"{share:.1g} times what" if share else "0; not so once:"


class CollapseWatch(L.Callback):
    """Warn, in one line, when an embedding collapses while it trains.

    It goes by the measurements of the :class:`stepwise_lightning.SpectrumLogger` that must stand beside it in the
    Trainer, and judges the matrix to look at first: what the loss drives, if the module says so, else the first that is
    measured. A :class:`stepwise_lightning.ForecastLogger` tells it when the next mode is due.
    :func:`stepwise_lightning.callbacks.collapse_monitor.find_collapse` says what is called a collapse, and
    ``tests/spectrum/test_collapse.py`` has a run that provokes each kind.

    Logged, to every logger, at each measurement: ``collapse/level``, 0 for none, 1 for a mode that has died, 2
    for a dimensional collapse, 3 for a complete one.

    Raises:
        UserError: when training starts, there is no SpectrumLogger.

    Attributes:
        found: what is true now, a :class:`Collapse`.

    """

    def __init__(self) -> None:
        self.found = Collapse("", "")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the measurements to go by."""
        spectra = [c for c in trainer.callbacks if isinstance(c, SpectrumLogger)]  # type: ignore[attr-defined]
        if not spectra:
            raise UserError("CollapseWatch needs a SpectrumLogger in the Trainer: add one")
        self._spectrum, self._measured, self._warned = spectra[0], 0, {""}
        self.found = Collapse("", "")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Judge, if there is a new measurement."""
        record = self._spectrum.record  # empty but in the first process
        if len(record) in (0, self._measured):
            return
        self._measured = len(record)
        matrix = Lead.of(pl_module, record.matrices).matrix
        self.found = find_collapse(record, matrix, self._spectrum.due.get(matrix, ()))
        if matrix == "tangent_covariance" and _NORMALISED in record.matrices:  # it has no scale that could vanish
            whole = find_collapse(record, _NORMALISED)
            self.found, matrix = (whole, _NORMALISED) if whole.kind == "complete collapse" else (self.found, matrix)
        step, prefix = int(record.steps[-1]), "" if self._spectrum.name == NAME else f"{self._spectrum.name}/"
        for logger in trainer.loggers:
            logger.log_metrics({f"{prefix}collapse/level": float(LEVELS[self.found.kind])}, step=step)
        if self.found.kind not in self._warned:
            self._warned.add(self.found.kind)
            rank_zero_warn(f"step {step}, {matrix}: {self.found.kind}: {self.found.reading}")
