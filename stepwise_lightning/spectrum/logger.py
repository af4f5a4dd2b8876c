"""The thin wire from a running Trainer to measures, the record, the loggers and files."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import lightning as L
import torch
from torch import Tensor

from stepwise_lightning.collectives import all_gather
from stepwise_lightning.errors import UserError
from stepwise_lightning.loggers import run_folder
from stepwise_lightning.record import Measurement, Spectrum, SpectrumRecord
from stepwise_lightning.spectrum.capture import capture, check_finite, check_watched, views_in
from stepwise_lightning.spectrum.measures import MATRICES, measure
from stepwise_lightning.spectrum.schedule import Clock, log_spaced_steps
from stepwise_lightning.spectrum.writers import (
    SpectrumTable,
    draw_trajectories,
    lay_out_charts,
    scalar_tag,
    write_steps,
)

# Seconds of training per second of drawing: what the figures that are redrawn while a run goes on may cost.
_DRAWING_SHARE = 500


class SpectrumLogger(L.Callback):
    """Log the full spectrum of embeddings while any LightningModule trains.

    The module is called on one or two views of the same samples, (n, …) each, at log-spaced steps, with batch
    normalisation on the statistics of those samples (see :func:`stepwise_lightning.spectrum.capture.capture`);
    training is bit-identical with and without this callback. In float64, the eigenvalues are computed of

    - ``cross_correlation``: C = (z1ᵀz2 + z2ᵀz1)/2n, where there are two views (``center`` subtracts the means);
    - ``covariance``: the centred covariance of all embeddings, of both views;
    - ``normalized_covariance``: the same of the embeddings divided by their norms, as cosine losses see them.

    **Step k** is the state after exactly k optimiser steps: step 0 is the initialisation, and a measurement at step k
    is made just before step k + 1 changes the weights, as is the training loss recorded with it. The last measurement
    is made when training ends and has no loss. **Time** is the sum of the learning rates of the steps so far.

    Written at each measurement, with ``<matrix>`` the name of one, or ``submodule.matrix`` for watched submodules:

    - to every logger of the Trainer: ``spectrum/<matrix>/eig_000`` … (descending), ``num_grown``, ``effective_rank``,
      ``participation_ratio``, ``alpha_req``, ``rankme`` and, when a mode has grown, ``grown_at_000`` …;
    - to TensorBoard also a custom-scalars layout with all eigenvalues of a matrix on one chart, and the trajectories
      as a figure, at the end and from time to time before;
    - to ``spectrum.csv`` in the Trainer's log directory, one value a row: ``step, time, matrix, quantity, mode, value``
      with quantity ``eigenvalue`` (mode 0, 1, …), one of the measures, or ``loss`` (matrix empty);
    - at the end of training to ``spectrum.npz`` beside it, everything: :meth:`stepwise_lightning.SpectrumRecord.load`
      reads it, :meth:`stepwise_lightning.SpectrumRecord.arrays` says what is in it;
    - then to ``steps.json`` what :func:`stepwise_lightning.spectrum.detect_steps` finds in each matrix.

    ``num_grown`` counts modes while training goes on: those whose eigenvalue has grown tenfold since the first
    measurement and exceeds a tenth of the largest. Which modes were *learned*, in how many distinct steps, can only be
    said of a run that has ended. ``docs/glossary.md`` has all these words.

    It is kept in checkpoints, so that a resumed run goes on with what was measured before, as if it had never stopped:
    ``spectrum.csv`` is written anew up to there, also in another folder. In a checkpoint it takes as much room as in
    the ``.npz``.

    Under DDP every process takes part: all embed the same probe pairs, or their parts of the training batch, which are
    gathered; rank 0 computes and writes.

    Args:
        watch: names of submodules whose outputs to measure besides the module's own, e.g. ``encoder.backbone``.
        probe: what to embed. ``"auto"``: ``trainer.datamodule.probe_pairs()`` where there is such a method, else the
            training batch of the step; ``"batch"``: always the training batch; or one tensor or a pair of tensors.
            In a batch, the second item counts as a second view if it has the first one's shape.
        matrices: which of the three matrices to measure.
        center: subtract the means before C is formed.
        num_points: about how many measurements to make.
        num_scalars: how many eigenvalues of a matrix become scalars and CSV rows; the ``.npz`` has all.
        prediction: the theory's eigenvalues of C, as a function from time (T,) to (T, d), for instance
            ``LinearBarlowTwins.embedding_eigenvalues``. They are written beside the module's own as
            ``predicted_eigenvalue`` (``cross_correlation/predicted`` in the ``.npz``) and drawn dashed.
        keep_embeddings: keep the module's own embeddings of every measurement, for questions asked later: 4 bytes per
            measurement, view, sample and dimension, in memory, in the ``.npz`` and in each checkpoint.

    Raises:
        ValueError: bad arguments; when training starts, an unknown submodule name (the error lists those that exist)
            or a run of unknown length.

    Attributes:
        record: what was measured so far, a :class:`stepwise_lightning.SpectrumRecord`.
        directory: where it is written, from the start of training on.

    """

    def __init__(
        self,
        watch: Sequence[str] = (),
        probe: str | Tensor | tuple[Tensor, Tensor] = "auto",
        matrices: Sequence[str] = MATRICES,
        center: bool = False,
        num_points: int = 200,
        num_scalars: int = 64,
        prediction: Callable[[Tensor], Tensor] | None = None,
        keep_embeddings: bool = False,
    ) -> None:
        for name, value, least in (("num_points", num_points, 2), ("num_scalars", num_scalars, 0)):
            if value < least:
                raise UserError(f"{name} must be at least {least}, got {value}")
        if isinstance(probe, str) and probe not in ("auto", "batch"):
            raise UserError(f"probe must be 'auto', 'batch' or tensors, got {probe!r}")
        if unknown := set(matrices) - set(MATRICES):
            raise UserError(f"unknown matrices {sorted(unknown)}; choose from: {', '.join(MATRICES)}")
        self.watch, self.probe, self.matrices, self.center = ("", *watch), probe, tuple(matrices), center
        self.num_points, self.num_scalars, self.prediction = num_points, num_scalars, prediction
        self.keep_embeddings = keep_embeddings
        self.record = SpectrumRecord()
        self._schedule: list[int] = []
        self._table: SpectrumTable | None = None
        self._batch: Any = None
        self._loss_due = False
        self._clock = Clock()

    def state_dict(self) -> dict[str, Any]:
        """Return all measurements so far, as tensors and numbers."""
        return {"record": self.record.arrays(), "clock": self._clock.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the measurements of a checkpoint."""
        self.record = SpectrumRecord.from_arrays(state_dict.get("record") or _arrays_of_version_0_1(state_dict))
        self._clock = Clock(*state_dict["clock"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lay out the schedule, fetch the probe pairs and begin the CSV file."""
        check_watched(pl_module, self.watch)
        last = trainer.estimated_stepping_batches
        if math.isinf(last):
            raise UserError("SpectrumLogger needs to know how long training lasts: set max_steps or max_epochs")
        self._schedule = [s for s in log_spaced_steps(int(last), self.num_points) if s >= trainer.global_step][::-1]
        self._next_figure = time.perf_counter() + _DRAWING_SHARE
        self._probe = self.probe
        if isinstance(self.probe, str):
            pairs = getattr(getattr(trainer, "datamodule", None), "probe_pairs", None)
            self._probe = pairs() if pairs is not None and self.probe == "auto" else "batch"
        self.directory = run_folder(trainer)  # a broadcast: every rank must ask
        # What was measured at this very step belonged to a run that ended here: now it has a loss too.
        self.record.keep(int((self.record.steps < trainer.global_step).sum()) if trainer.is_global_zero else 0)
        if trainer.is_global_zero:
            if self.prediction is not None and "cross_correlation" in self.record.matrices:
                self.record.predict(torch.stack([self._predicted(time) for time in self.record.times]))
            rows = (row for index in range(len(self.record)) for row in self.record.rows(index, self.num_scalars))
            self._table = SpectrumTable(self.directory / "spectrum.csv", rows)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure, if this step is on the schedule, before the batch changes the weights."""
        self._batch = batch
        step = trainer.global_step
        self._clock.advance(step, trainer.optimizers[0].param_groups[0]["lr"])
        if self._schedule and step >= self._schedule[-1]:
            self._measure(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the loss that belongs to the last measurement."""
        if self._loss_due and outputs is not None:
            self._loss_due = False
            self.record.set_loss(float(outputs["loss"] if isinstance(outputs, dict) else outputs))
            if self._table is not None:
                self._table.add(row for row in self.record.rows(-1, 0) if row[3] == "loss")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the final weights and write the ``.npz`` file, the steps found and the figure."""
        if self._batch is not None and (not len(self.record) or self.record.steps[-1] < trainer.global_step):
            self._measure(trainer, pl_module)
        if self._table is not None:
            write_steps(self.directory / "steps.json", self.record)
        self._close()
        if len(self.record):
            draw_trajectories(trainer, self.record, self.num_scalars)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Keep what has been measured when training is interrupted."""
        with suppress(OSError):  # a second one, of a full disk, would hide what happened
            self._close()

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Embed the probe on every rank; on rank 0, measure it, and hand on what was measured."""
        step = trainer.global_step
        while self._schedule and self._schedule[-1] <= step:
            self._schedule.pop()
        probe = self._batch if isinstance(self._probe, str) else self._probe
        samples = views_in(probe, pl_module)
        captured = capture(pl_module, samples, self.watch)
        if self._probe == "batch" and trainer.world_size > 1:
            captured = {name: [all_gather(z).flatten(0, 1) for z in views] for name, views in captured.items()}
        check_finite(captured, samples, pl_module, step)
        if trainer.is_global_zero:
            self.record.append(self._measurement(step, captured))
            self._loss_due = True
            self._hand_on(trainer)

    def _measurement(self, step: int, captured: dict[str, list[Tensor]]) -> Measurement:
        measurement = Measurement(step, self._clock.time(step))
        for name, views in captured.items():
            for matrix in self.matrices:
                if matrix != "cross_correlation" or len(views) == 2:
                    spectrum = Spectrum(*measure(matrix, views, self.center))
                    measurement.spectra[f"{name}.{matrix}" if name else matrix] = spectrum
        if self.prediction is not None and "cross_correlation" in measurement.spectra:
            measurement.predicted = self._predicted(torch.tensor(measurement.time, dtype=torch.float64))
        if self.keep_embeddings:
            measurement.embeddings = torch.stack(captured[""]).float().cpu()
        return measurement

    def _predicted(self, time: Tensor) -> Tensor:
        assert self.prediction is not None
        # One by one, also for a run that goes on: together they would be rounded otherwise.
        return self.prediction(time[None])[0].detach().double().cpu()

    def _hand_on(self, trainer: L.Trainer) -> None:
        """Write the last measurement to the table and the loggers, and perhaps draw what there is so far."""
        rows = self.record.rows(-1, self.num_scalars)
        if self._table is not None:
            self._table.add(rows)
        if len(self.record) == 1:
            lay_out_charts(trainer, self.record.matrices)
        for logger in trainer.loggers:
            logger.log_metrics({scalar_tag(row): row[-1] for row in rows}, step=int(self.record.steps[-1]))
        if time.perf_counter() > self._next_figure:
            start = time.perf_counter()
            draw_trajectories(trainer, self.record, self.num_scalars)
            self._next_figure = time.perf_counter() + _DRAWING_SHARE * (time.perf_counter() - start)

    def _close(self) -> None:
        if self._table is not None:
            self._table = None
            self.record.save(self.directory / "spectrum.npz")


def _arrays_of_version_0_1(state: dict[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint of version 0.1 holds, by the names that a record gives it."""
    arrays = {"step": state["steps"], "time": state["times"], "loss": state["losses"]}
    arrays |= state["eigenvalues"] | state["measures"]
    return arrays if state["embeddings"] is None else arrays | {"embeddings": state["embeddings"]}
