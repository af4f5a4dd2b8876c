"""Callbacks: thin wires from a running Trainer to spectrum.py, the loggers and files."""

from __future__ import annotations

import csv
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from stepwise_lightning.capture import capture, check_watched, from_all_ranks
from stepwise_lightning.schedule import Clock, log_spaced_steps
from stepwise_lightning.spectrum import (
    alpha_req,
    cross_correlation_eigenvalues,
    detect_steps,
    effective_rank,
    embedding_eigenvalues,
    participation_ratio,
    rankme,
)

MATRICES = ("cross_correlation", "covariance", "normalized_covariance")
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
            measurement, view, sample and dimension, in memory and in the ``.npz``.

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
        if num_points < 2:
            raise ValueError(f"num_points must be at least 2, got {num_points}")
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
        self._file: TextIO | None = None
        self._batch: Any = None
        self._loss_due = False
        self._clock = Clock()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lay out the schedule, fetch the probe pairs and open the CSV file."""
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
        if trainer.is_global_zero:
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
        """Measure the final weights and write the ``.npz`` file and the figure."""
        if self._batch is not None and (not self.steps or self.steps[-1] < trainer.global_step):
            self._measure(trainer, pl_module)
        self._close()
        self._draw(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Keep what has been measured when training is interrupted."""
        self._close()

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step = trainer.global_step
        while self._schedule and self._schedule[-1] <= step:
            self._schedule.pop()
        captured = capture(pl_module, self._views(pl_module), self.watch)
        if self._probe == "batch" and trainer.world_size > 1:
            captured = {
                name: [from_all_ranks(pl_module, z).flatten(0, 1) for z in views] for name, views in captured.items()
            }
        for name, views in captured.items():
            if not all(z.isfinite().all() for z in views):
                raise FloatingPointError(
                    f"the output of {name or type(pl_module).__name__} at step {step} is not finite: training has most "
                    "likely diverged; lower the learning rate"
                )
        if not trainer.is_global_zero:
            return
        self.steps.append(step)
        self.times.append(self._clock.time(step))
        self.losses.append(math.nan)
        self._loss_due = True
        rows: list[tuple[str, str, int | str, float]] = []
        if self.keep_embeddings:
            self.embeddings.append(torch.stack(captured[""]).float().cpu())
        for name, views in captured.items():
            for matrix in self.matrices:
                if matrix != "cross_correlation" or len(views) == 2:
                    rows += self._spectrum(f"{name}.{matrix}" if name else matrix, matrix, views)
        self._write_rows(rows)
        scalars = {f"spectrum/{what}/{_tag(quantity, mode)}": value for what, quantity, mode, value in rows}
        if len(self.steps) == 1:
            charts = {w: ["Multiline", [f"^spectrum/{w}/eig_[0-9]+$"]] for w in self.eigenvalues}
            for board in _boards(trainer):
                board.add_custom_scalars({"spectrum": charts})
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=step)
        if time.perf_counter() > self._next_figure:
            start = time.perf_counter()
            self._draw(trainer)
            self._next_figure = time.perf_counter() + _DRAWING_SHARE * (time.perf_counter() - start)

    def _views(self, pl_module: L.LightningModule) -> list[Tensor]:
        probe = self._batch if isinstance(self._probe, str) else self._probe
        if isinstance(probe, Tensor):
            views = [probe]
        else:
            second = probe[1] if len(probe) > 1 and isinstance(probe[1], Tensor) else None
            views = [probe[0]] if second is None or second.shape != probe[0].shape else [probe[0], second]
        parameter = next(p for p in pl_module.parameters() if p.is_floating_point())
        return [view.to(parameter) if view.is_floating_point() else view.to(parameter.device) for view in views]

    def _spectrum(self, what: str, matrix: str, views: list[Tensor]) -> list[tuple[str, str, int | str, float]]:
        """Measure one matrix, keep the result, and return its rows."""
        views = [z.double() for z in views]
        if matrix == "cross_correlation":
            eigenvalues = cross_correlation_eigenvalues(views[0], views[1], center=self.center)
        else:
            z = torch.cat(views)
            z = torch.nn.functional.normalize(z) if matrix == "normalized_covariance" else z
            eigenvalues = embedding_eigenvalues(z)
        eigenvalues = eigenvalues.cpu()
        self.eigenvalues.setdefault(what, []).append(eigenvalues)
        measures: dict[str, float] = {
            "num_learned": self._num_learned(what),
            "effective_rank": float(effective_rank(eigenvalues)),
            "participation_ratio": float(participation_ratio(eigenvalues)),
            "alpha_req": float(alpha_req(eigenvalues)),
        }
        if matrix != "cross_correlation":  # RankMe is a property of the embeddings
            measures["rankme"] = float(rankme(z))
        before = max(self.measures.get(f"{what}/num_learned", [0]))
        for name, value in measures.items():
            self.measures.setdefault(f"{what}/{name}", []).append(value)
        rows: list[tuple[str, str, int | str, float]] = [(what, name, "", value) for name, value in measures.items()]
        rows += [(what, "step_time", k, self.times[-1]) for k in range(int(before), int(measures["num_learned"]))]
        shown = {"eigenvalue": eigenvalues}
        if self.prediction is not None and what == "cross_correlation":
            shown["predicted_eigenvalue"] = self.predicted(self.times[-1:])[0]
        for quantity, values in shown.items():
            rows += [(what, quantity, mode, value) for mode, value in enumerate(values[: self.num_scalars].tolist())]
        return rows

    def predicted(self, times: list[float]) -> Tensor:
        """Return the prediction at these times, (T, d)."""
        assert self.prediction is not None
        return self.prediction(torch.tensor(times, dtype=torch.float64)).detach().double().cpu()

    def _num_learned(self, what: str) -> int:
        first, last = self.eigenvalues[what][0], self.eigenvalues[what][-1]
        return int(((last > 0.1 * last[0]) & (last > 10 * first)).sum())

    def _write_rows(self, rows: list[tuple[str, str, int | str, float]]) -> None:
        if self._file is not None:
            head = (self.steps[-1], repr(self.times[-1]))
            csv.writer(self._file).writerows((*head, *row[:-1], repr(row[-1])) for row in rows)
            self._file.flush()

    def _draw(self, trainer: L.Trainer) -> None:
        """Add the trajectories so far, with the steps found in them, to TensorBoard."""
        boards = _boards(trainer)
        if not boards or len(self.steps) < 3:
            return
        from stepwise_lightning.plots import Trajectory, trajectories_figure

        times, losses = torch.tensor(self.times, dtype=torch.float64), torch.tensor(self.losses, dtype=torch.float64)
        if not (times.diff() > 0).all():
            rank_zero_warn("no trajectories are drawn: the learning rate was 0, so that time stood still")
            return
        for what, values in self.eigenvalues.items():
            eigenvalues = torch.stack(values)
            steps = detect_steps(times, eigenvalues)
            shown = eigenvalues[:, : self.num_scalars].numpy()
            title = f"{steps.num_distinct} distinct steps so far"
            run = Trajectory(title, times.numpy(), losses.numpy(), shown, step_times=steps.step_times.numpy())
            if self.prediction is not None and what == "cross_correlation":
                run.theory_eigenvalues = self.predicted(self.times)[:, : self.num_scalars].numpy()
            figure = trajectories_figure([run], title=what, eigenvalues_label="eigenvalues", log_eigenvalues=True)
            for board in boards:
                board.add_figure(f"spectrum/{what}", figure, self.steps[-1])

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
        arrays |= {what: torch.stack(values).numpy() for what, values in self.eigenvalues.items()}
        arrays |= {name: np.array(values) for name, values in self.measures.items()}
        if self.prediction is not None and "cross_correlation" in self.eigenvalues:
            arrays["cross_correlation/predicted"] = self.predicted(self.times).numpy()
        if self.embeddings:
            arrays["embeddings"] = torch.stack(self.embeddings).numpy()
        partial = self.directory / "spectrum.npz.partial"
        with partial.open("wb") as file:
            np.savez(file, **arrays)
        os.replace(partial, self.directory / "spectrum.npz")


def _tag(quantity: str, mode: int | str) -> str:
    short = {"eigenvalue": "eig", "predicted_eigenvalue": "predicted"}.get(quantity, quantity)
    return short if mode == "" else f"{short}_{mode:03d}"


def _boards(trainer: L.Trainer) -> list[Any]:
    """Return the TensorBoard writers, of ``lightning`` as of ``pytorch_lightning``, whose loggers share no class."""
    writers = [getattr(logger, "experiment", None) for logger in trainer.loggers]
    return [writer for writer in writers if hasattr(writer, "add_custom_scalars")]
