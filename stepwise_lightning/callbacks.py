"""Callbacks: thin wires from a running Trainer to spectrum.py, the loggers and files."""

from __future__ import annotations

import csv
import math
import os
from pathlib import Path
from typing import Any, TextIO

import lightning as L
import torch
from torch import Tensor

from stepwise_lightning.spectrum import cross_correlation_eigenvalues, effective_rank, embedding_eigenvalues


def log_spaced_steps(last_step: int, num_points: int) -> list[int]:
    """Return about ``num_points`` steps, ascending, evenly spaced in the logarithm: 0, 1, 2, …, last_step.

    The step before the last is always among them: it is the last one that has a training loss.
    """
    if last_step < 1 or num_points < 2:
        raise ValueError(f"a schedule needs last_step ≥ 1 and num_points ≥ 2, got {last_step} and {num_points}")
    spaced = torch.logspace(0, math.log10(last_step), num_points, dtype=torch.float64).round().long().tolist()
    return sorted({0, *spaced, last_step - 1, last_step})


class SpectrumLogger(L.Callback):
    """Log the full spectrum of the embeddings while a model trains.

    Works on any LightningModule that maps a view (n, …) to embeddings (n, d) and whose batches start with two views.
    On a log-spaced schedule, the training batch of that step is embedded in evaluation mode and the eigenvalues of two
    matrices are computed in float64: ``cross_correlation``, C = (z1ᵀz2 + z2ᵀz1)/2n, and ``covariance``, the centred
    covariance of both views.

    **Step k** is the state after exactly k optimiser steps: step 0 is the initialisation, and a measurement at step k
    is made just before step k + 1 changes the weights, as is the training loss recorded with it. The last measurement
    is made when training ends and has no loss. **Time** is the sum of the learning rates of the steps so far.

    Written at each measurement:

    - to every logger of the Trainer: ``spectrum/<matrix>/eig_000`` … (descending), ``…/num_learned``,
      ``…/effective_rank``;
    - to ``spectrum.csv`` in the Trainer's log directory, one value a row: ``step, time, matrix, quantity, mode, value``
      with quantity ``eigenvalue`` (mode 0, 1, …), ``num_learned``, ``effective_rank``, or ``loss`` (matrix empty);
    - at the end of training to ``spectrum.npz`` beside it: ``step``, ``time``, ``loss`` (T,) and, for each matrix,
      its eigenvalues (T, d).

    A mode counts as learned, while training runs, when its eigenvalue has grown tenfold since step 0 and exceeds a
    tenth of the largest. :func:`stepwise_lightning.spectrum.detect_steps` judges a finished run.

    Args:
        num_points: about how many measurements to make.

    """

    def __init__(self, num_points: int = 200) -> None:
        if num_points < 2:
            raise ValueError(f"num_points must be at least 2, got {num_points}")
        self.num_points = num_points
        self.steps: list[int] = []
        self.times: list[float] = []
        self.losses: list[float] = []
        self.eigenvalues: dict[str, list[Tensor]] = {"cross_correlation": [], "covariance": []}
        self._schedule: list[int] = []
        self._file: TextIO | None = None
        self._batch: Any = None
        self._loss_due = False
        self._clock = _Clock()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lay out the schedule and open the CSV file."""
        last = trainer.estimated_stepping_batches
        if math.isinf(last):
            raise ValueError("SpectrumLogger needs to know how long training lasts: set max_steps or max_epochs")
        self._schedule = [s for s in log_spaced_steps(int(last), self.num_points) if s >= trainer.global_step][::-1]
        if trainer.is_global_zero:
            self.directory = Path(trainer.log_dir or trainer.default_root_dir)
            self.directory.mkdir(parents=True, exist_ok=True)
            self._file = (self.directory / "spectrum.csv").open("w", newline="")
            csv.writer(self._file).writerow(["step", "time", "matrix", "quantity", "mode", "value"])

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
            loss = float(outputs["loss"] if isinstance(outputs, dict) else outputs)
            self.losses[-1] = loss
            self._write_rows([("", "loss", "", loss)])

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the final weights and write the ``.npz`` file."""
        if self._batch is not None and (not self.steps or self.steps[-1] < trainer.global_step):
            self._measure(trainer, pl_module)
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Keep what has been measured when training is interrupted."""
        self._close()

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step = trainer.global_step
        while self._schedule and self._schedule[-1] <= step:
            self._schedule.pop()
        z1, z2 = _embed(pl_module, self._batch)
        self.steps.append(step)
        self.times.append(self._clock.time(step))
        self.losses.append(math.nan)
        self._loss_due = True
        spectra = {
            "cross_correlation": cross_correlation_eigenvalues(z1, z2),
            "covariance": embedding_eigenvalues(torch.cat([z1, z2])),
        }
        rows: list[tuple[str, str, int | str, float]] = []
        for matrix, eigenvalues in spectra.items():
            self.eigenvalues[matrix].append(eigenvalues.cpu())
            rows += [(matrix, "eigenvalue", mode, value) for mode, value in enumerate(eigenvalues.tolist())]
            rows.append((matrix, "num_learned", "", self._num_learned(matrix)))
            rows.append((matrix, "effective_rank", "", float(effective_rank(eigenvalues))))
        self._write_rows(rows)
        scalars = {
            f"spectrum/{matrix}/" + (f"eig_{mode:03d}" if quantity == "eigenvalue" else quantity): value
            for matrix, quantity, mode, value in rows
        }
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=step)

    def _num_learned(self, matrix: str) -> int:
        first, last = self.eigenvalues[matrix][0], self.eigenvalues[matrix][-1]
        return int(((last > 0.1 * last[0]) & (last > 10 * first)).sum())

    def _write_rows(self, rows: list[tuple[str, str, int | str, float]]) -> None:
        if self._file is not None:
            head = (self.steps[-1], repr(self.times[-1]))
            csv.writer(self._file).writerows((*head, *row[:-1], repr(row[-1])) for row in rows)
            self._file.flush()

    def _close(self) -> None:
        if self._file is None:
            return
        import numpy as np

        self._file.close()
        self._file = None
        arrays: dict[str, Any] = {
            "step": np.array(self.steps),
            "time": np.array(self.times),
            "loss": np.array(self.losses),
        }
        arrays |= {name: torch.stack(values).numpy() for name, values in self.eigenvalues.items() if values}
        partial = self.directory / "spectrum.npz.partial"
        with partial.open("wb") as file:
            np.savez(file, **arrays)
        os.replace(partial, self.directory / "spectrum.npz")


class _Clock:
    """Sums the learning rates of the steps taken; exactly rate × step while the rate is constant."""

    def __init__(self) -> None:
        self._before, self._start, self._rate = 0.0, 0, 0.0

    def advance(self, step: int, rate: float) -> None:
        """Note the rate with which the step after ``step`` is about to be taken."""
        if rate != self._rate:
            self._before, self._start, self._rate = self.time(step), step, rate

    def time(self, step: int) -> float:
        return self._before + self._rate * (step - self._start)


@torch.no_grad()
def _embed(module: L.LightningModule, batch: Any) -> tuple[Tensor, Tensor]:
    """Embed the two views in evaluation mode and leave the module as it was."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        return module(batch[0]), module(batch[1])
    finally:
        for part, training in modes.items():
            part.training = training
