"""Callbacks: thin wires from a running Trainer to spectrum.py, the loggers and files."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from stepwise_lightning.capture import capture, check_finite, check_watched, views_in
from stepwise_lightning.collectives import from_all_ranks
from stepwise_lightning.schedule import Clock, log_spaced_steps
from stepwise_lightning.spectrum import MATRICES, measure
from stepwise_lightning.spectrum_files import (
    Row,
    SpectrumTable,
    draw_trajectories,
    lay_out_charts,
    scalar_tag,
    write_arrays,
)

# Seconds of training per second of drawing: what the figures that are redrawn while a run goes on may cost.
_DRAWING_SHARE = 500


class SpectrumLogger(L.Callback):
    """Log the full spectrum of embeddings while any LightningModule trains.

    The module is called on one or two views of the same samples, (n, …) each, at log-spaced steps, with batch
    normalisation on the statistics of those samples (see :func:`stepwise_lightning.capture.capture`); training is
    bit-identical with and without this callback. In float64, the eigenvalues are computed of

    - ``cross_correlation``: C = (z1ᵀz2 + z2ᵀz1)/2n, where there are two views (``center`` subtracts the means);
    - ``covariance``: the centred covariance of all embeddings, of both views;
    - ``normalized_covariance``: the same of the embeddings divided by their norms, as cosine losses see them.

    **Step k** is the state after exactly k optimiser steps: step 0 is the initialisation, and a measurement at step k
    is made just before step k + 1 changes the weights, as is the training loss recorded with it. The last measurement
    is made when training ends and has no loss. **Time** is the sum of the learning rates of the steps so far.

    Written at each measurement, with ``<what>`` the name of a matrix, or ``submodule.matrix`` for watched submodules:

    - to every logger of the Trainer: ``spectrum/<what>/eig_000`` … (descending), ``num_learned``, ``effective_rank``,
      ``participation_ratio``, ``alpha_req``, ``rankme`` and, when a mode is learned, ``step_time_000`` …;
    - to TensorBoard also a custom-scalars layout with all eigenvalues of a matrix on one chart, and the trajectories
      as a figure, at the end and from time to time before;
    - to ``spectrum.csv`` in the Trainer's log directory, one value a row: ``step, time, matrix, quantity, mode, value``
      with quantity ``eigenvalue`` (mode 0, 1, …), one of the measures, or ``loss`` (matrix empty);
    - at the end of training to ``spectrum.npz`` beside it: ``step``, ``time``, ``loss`` (T,), for each ``<what>`` its
      eigenvalues (T, d) and for each measure ``<what>/<measure>`` (T,); with ``keep_embeddings`` also ``embeddings``
      (T, views, n, d), float32.

    A mode counts as learned, while training runs, when its eigenvalue has grown tenfold since step 0 and exceeds a
    tenth of the largest. :func:`stepwise_lightning.spectrum.detect_steps` judges a finished run.

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
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if isinstance(probe, str) and probe not in ("auto", "batch"):
            raise ValueError(f"probe must be 'auto', 'batch' or tensors, got {probe!r}")
        if unknown := set(matrices) - set(MATRICES):
            raise ValueError(f"unknown matrices {sorted(unknown)}; choose from: {', '.join(MATRICES)}")
        self.watch, self.probe, self.matrices, self.center = ("", *watch), probe, tuple(matrices), center
        self.num_points, self.num_scalars, self.prediction = num_points, num_scalars, prediction
        self.keep_embeddings = keep_embeddings
        self.embeddings: list[Tensor] = []  # (views, n, d) each
        self.steps: list[int] = []
        self.times: list[float] = []
        self.losses: list[float] = []
        self.eigenvalues: dict[str, list[Tensor]] = {}
        self.measures: dict[str, list[float]] = {}
        self._schedule: list[int] = []
        self._table: SpectrumTable | None = None
        self._batch: Any = None
        self._loss_due = False
        self._clock = Clock()

    def state_dict(self) -> dict[str, Any]:
        """Return all measurements so far, as tensors and numbers."""
        return {
            "steps": list(self.steps),
            "times": list(self.times),
            "losses": list(self.losses),
            "eigenvalues": {what: torch.stack(values) for what, values in self.eigenvalues.items()},
            "measures": {name: list(values) for name, values in self.measures.items()},
            "embeddings": torch.stack(self.embeddings) if self.embeddings else None,
            "clock": self._clock.state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the measurements of a checkpoint."""
        self.steps, self.times, self.losses = (list(state_dict[name]) for name in ("steps", "times", "losses"))
        self.eigenvalues = {what: list(values) for what, values in state_dict["eigenvalues"].items()}
        self.measures = {name: list(values) for name, values in state_dict["measures"].items()}
        self.embeddings = [] if state_dict["embeddings"] is None else list(state_dict["embeddings"])
        self._clock = Clock(*state_dict["clock"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lay out the schedule, fetch the probe pairs and begin the CSV file."""
        check_watched(pl_module, self.watch)
        last = trainer.estimated_stepping_batches
        if math.isinf(last):
            raise ValueError("SpectrumLogger needs to know how long training lasts: set max_steps or max_epochs")
        self._schedule = [s for s in log_spaced_steps(int(last), self.num_points) if s >= trainer.global_step][::-1]
        self._next_figure = time.perf_counter() + _DRAWING_SHARE
        self._probe = self.probe
        if isinstance(self.probe, str):
            pairs = getattr(getattr(trainer, "datamodule", None), "probe_pairs", None)
            self._probe = pairs() if pairs is not None and self.probe == "auto" else "batch"
        self.directory = Path(trainer.log_dir or trainer.default_root_dir)  # a broadcast: every rank must ask
        # What was measured at this very step belonged to a run that ended here: now it has a loss too.
        self._forget(sum(step < trainer.global_step for step in self.steps) if trainer.is_global_zero else 0)
        if trainer.is_global_zero:
            rows = (row for index in range(len(self.steps)) for row in (*self._rows(index), *self._loss_row(index)))
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
            self.losses[-1] = float(outputs["loss"] if isinstance(outputs, dict) else outputs)
            if self._table is not None:
                self._table.add(self._loss_row(-1))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the final weights and write the ``.npz`` file and the figure."""
        if self._batch is not None and (not self.steps or self.steps[-1] < trainer.global_step):
            self._measure(trainer, pl_module)
        self._close()
        self._draw(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Keep what has been measured when training is interrupted."""
        with suppress(OSError):  # a second one, of a full disk, would hide what happened
            self._close()

    def _forget(self, kept: int) -> None:
        """Keep the first measurements alone."""
        kept_of_each: list[list[Any]] = [self.steps, self.times, self.losses, self.embeddings]
        for values in (*kept_of_each, *self.eigenvalues.values(), *self.measures.values()):
            del values[kept:]
        if not kept:  # or empty lists would stay, which nothing can be made of
            self.eigenvalues, self.measures = {}, {}

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step = trainer.global_step
        while self._schedule and self._schedule[-1] <= step:
            self._schedule.pop()
        probe = self._batch if isinstance(self._probe, str) else self._probe
        samples = views_in(probe, pl_module)
        captured = capture(pl_module, samples, self.watch)
        if self._probe == "batch" and trainer.world_size > 1:
            captured = {name: [from_all_ranks(z).flatten(0, 1) for z in views] for name, views in captured.items()}
        check_finite(captured, samples, pl_module, step)
        if not trainer.is_global_zero:
            return
        self.steps.append(step)
        self.times.append(self._clock.time(step))
        self.losses.append(math.nan)
        self._loss_due = True
        if self.keep_embeddings:
            self.embeddings.append(torch.stack(captured[""]).float().cpu())
        for name, views in captured.items():
            for matrix in self.matrices:
                if matrix != "cross_correlation" or len(views) == 2:
                    self._spectrum(f"{name}.{matrix}" if name else matrix, matrix, views)
        rows = self._rows(-1)
        if self._table is not None:
            self._table.add(rows)
        if len(self.steps) == 1:
            lay_out_charts(trainer, self.eigenvalues)
        for logger in trainer.loggers:
            logger.log_metrics({scalar_tag(row): row[-1] for row in rows}, step=step)
        if time.perf_counter() > self._next_figure:
            start = time.perf_counter()
            self._draw(trainer)
            self._next_figure = time.perf_counter() + _DRAWING_SHARE * (time.perf_counter() - start)

    def _spectrum(self, what: str, matrix: str, views: list[Tensor]) -> None:
        """Measure one matrix, and keep the result."""
        eigenvalues, measures = measure(matrix, views, self.center)
        self.eigenvalues.setdefault(what, []).append(eigenvalues)
        for name, value in ({"num_learned": self._num_learned(what)} | measures).items():
            self.measures.setdefault(f"{what}/{name}", []).append(value)

    def _rows(self, index: int) -> list[Row]:
        """Return what one measurement says, but for the loss."""
        index %= len(self.steps)
        head = (self.steps[index], self.times[index])
        rows: list[Row] = []
        for what, values in self.eigenvalues.items():
            prefix, learned = f"{what}/", self.measures[f"{what}/num_learned"]
            for name, measured in self.measures.items():
                if name.startswith(prefix):
                    rows.append((*head, what, name.removeprefix(prefix), "", measured[index]))
            before = int(max(learned[:index], default=0))
            rows += [(*head, what, "step_time", k, self.times[index]) for k in range(before, int(learned[index]))]
            shown = {"eigenvalue": values[index]}
            if self.prediction is not None and what == "cross_correlation":
                shown["predicted_eigenvalue"] = self.predicted([self.times[index]])[0]
            for quantity, each in shown.items():
                rows += [(*head, what, quantity, k, value) for k, value in enumerate(each[: self.num_scalars].tolist())]
        return rows

    def _loss_row(self, index: int) -> list[Row]:
        """Return the row of a measurement's loss; none where it has none."""
        loss = self.losses[index]
        return [] if math.isnan(loss) else [(self.steps[index], self.times[index], "", "loss", "", loss)]

    def predicted(self, times: list[float]) -> Tensor:
        """Return the prediction at these times, (T, d)."""
        assert self.prediction is not None
        return self.prediction(torch.tensor(times, dtype=torch.float64)).detach().double().cpu()

    def _num_learned(self, what: str) -> int:
        first, last = self.eigenvalues[what][0], self.eigenvalues[what][-1]
        return int(((last > 0.1 * last[0]) & (last > 10 * first)).sum())

    def _predicted_so_far(self) -> Tensor | None:
        known = self.prediction is not None and "cross_correlation" in self.eigenvalues
        return self.predicted(self.times) if known else None

    def _draw(self, trainer: L.Trainer) -> None:
        if self.steps:
            eigenvalues = {what: torch.stack(values) for what, values in self.eigenvalues.items()}
            predicted = self._predicted_so_far()
            draw_trajectories(trainer, self.steps, self.times, self.losses, eigenvalues, predicted, self.num_scalars)

    def _close(self) -> None:
        if self._table is None:
            return
        self._table = None
        arrays: dict[str, Any] = {"step": self.steps, "time": self.times, "loss": self.losses, **self.measures}
        arrays |= {what: torch.stack(values) for what, values in self.eigenvalues.items()}
        if (predicted := self._predicted_so_far()) is not None:
            arrays["cross_correlation/predicted"] = predicted
        if self.embeddings:
            arrays["embeddings"] = torch.stack(self.embeddings)
        write_arrays(self.directory / "spectrum.npz", arrays)
