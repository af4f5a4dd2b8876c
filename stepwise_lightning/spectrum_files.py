"""What SpectrumLogger leaves behind: a table, arrays, and TensorBoard's charts."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from stepwise_lightning.files import replace
from stepwise_lightning.spectrum import detect_steps

COLUMNS = ["step", "time", "matrix", "quantity", "mode", "value"]
# (step, time, matrix, quantity, mode, value)
Row = tuple[int, float, str, str, int | str, float]


class SpectrumTable:
    """``spectrum.csv``, which grows while training goes on: each time it is replaced by a longer one.

    It begins with the rows that a resumed run has already, whatever the file held before.

    Raises:
        OSError: it cannot be written (here or later).

    """

    def __init__(self, path: Path, rows: Iterable[Row] = ()) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._content = path, BytesIO()
        self._text = TextIOWrapper(self._content, "utf-8", newline="")
        csv.writer(self._text).writerow(COLUMNS)
        self.add(rows)

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows; when this returns, they are on the disk."""
        csv.writer(self._text).writerows(map(_exactly, rows))
        self._text.flush()
        # Not appended to the file: a kill could cut a number short, which nobody would notice.
        replace(self.path, lambda partial: partial.write_bytes(self._content.getbuffer()))


def _exactly(row: Row) -> tuple[Any, ...]:
    return row[0], repr(row[1]), *row[2:-1], repr(row[-1])


def write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """Write tensors and lists to an ``.npz`` file in one piece; OSError if it cannot be."""
    import numpy as np

    arrays = {name: np.asarray(values) for name, values in arrays.items()}
    replace(path, lambda partial: np.savez(partial, **arrays))


def scalar_tag(row: Row) -> str:
    """Return what a row is called in TensorBoard."""
    _, _, what, quantity, mode, _ = row
    short = {"eigenvalue": "eig", "predicted_eigenvalue": "predicted"}.get(quantity, quantity)
    return f"spectrum/{what}/{short}" if mode == "" else f"spectrum/{what}/{short}_{mode:03d}"


def boards(trainer: L.Trainer) -> list[Any]:
    """Return the TensorBoard writers, of ``lightning`` as of ``pytorch_lightning``, whose loggers share no class."""
    writers = [getattr(logger, "experiment", None) for logger in trainer.loggers]
    return [writer for writer in writers if hasattr(writer, "add_custom_scalars")]


def lay_out_charts(trainer: L.Trainer, whats: Iterable[str]) -> None:
    """Put all eigenvalues of a matrix on one chart of TensorBoard's custom scalars."""
    charts = {what: ["Multiline", [f"^spectrum/{what}/eig_[0-9]+$"]] for what in whats}
    for board in boards(trainer):
        board.add_custom_scalars({"spectrum": charts})


def draw_trajectories(
    trainer: L.Trainer,
    steps: list[int],
    times: list[float],
    losses: list[float],
    eigenvalues: dict[str, Tensor],
    predicted: Tensor | None,
    num_shown: int,
) -> None:
    """Add the trajectories so far, with the steps found in them, to TensorBoard.

    Args:
        trainer: the trainer, whose loggers are written to.
        steps: of the measurements, as times and losses, (T,) each.
        times: learning rate × steps.
        losses: of the training batches; NaN at the end.
        eigenvalues: of each matrix, (T, d).
        predicted: of the cross-correlation, (T, d), or None.
        num_shown: how many of the d.

    """
    writers = boards(trainer)
    if not writers or len(steps) < 3:
        return
    from stepwise_lightning.plots import Trajectory, trajectories_figure

    t = torch.tensor(times, dtype=torch.float64)
    if not (t.diff() > 0).all():
        rank_zero_warn("no trajectories are drawn: the learning rate was 0, so that time stood still")
        return
    loss = torch.tensor(losses, dtype=torch.float64).numpy()
    for what, values in eigenvalues.items():
        found = detect_steps(t, values)
        title, shown = f"{found.num_distinct} distinct steps so far", values[:, :num_shown].numpy()
        run = Trajectory(title, t.numpy(), loss, shown, step_times=found.step_times.numpy())
        if predicted is not None and what == "cross_correlation":
            run.theory_eigenvalues = predicted[:, :num_shown].numpy()
        figure = trajectories_figure([run], title=what, eigenvalues_label="eigenvalues", log_eigenvalues=True)
        for board in writers:
            board.add_figure(f"spectrum/{what}", figure, steps[-1])
