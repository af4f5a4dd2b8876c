"""Convert spectrum records to rows of ``data.csv``, TensorBoard events and theoretical records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from stepwise_lightning import SpectrumRecord
from stepwise_lightning.callbacks.tensorboard import measured_scalars, predicted_scalars


def theory_record(record: SpectrumRecord, eigenvalues: Tensor) -> SpectrumRecord:
    """Return a record of predicted eigenvalues of C, (T, d), and their loss ‖C − I‖², at the times of a record."""
    return SpectrumRecord.of(record.times, eigenvalues, (1 - eigenvalues).square().sum(1), steps=record.steps)


def data_rows(
    run: Sequence[Any],
    record: SpectrumRecord,
    matrix: str = "cross_correlation",
    theories: Sequence[SpectrumRecord] = (),
    others: Mapping[str, Tensor] | None = None,
) -> list[list[Any]]:
    """Return rows ``*run, step, time, quantity, mode, value, *theoretical values``, ordered by step.

    Args:
        run: first cells of each row, which identify the run.
        record: measured loss (empty mode) and eigenvalues (modes 0, 1, …) of ``matrix``.
        matrix: name of the matrix.
        theories: predictions of loss and eigenvalues at the same steps.
        others: further measured quantities by name, (T,) or, with modes, (T, k).

    """
    sources = (record, *theories)
    quantities = {
        "loss": [source.losses for source in sources],
        "eigenvalue": [source.eigenvalues(matrix) for source in sources],
    } | {name: [values] for name, values in (others or {}).items()}
    rows: list[list[Any]] = []
    for index, (step, time) in enumerate(zip(record.steps.tolist(), record.times.tolist(), strict=True)):
        for quantity, columns in quantities.items():
            values = [column[index].tolist() for column in columns]
            if isinstance(values[0], list):
                rows += [
                    [*run, step, time, quantity, mode, *by_mode]
                    for mode, by_mode in enumerate(zip(*values, strict=True))
                ]
            else:
                rows.append([*run, step, time, quantity, "", *values])
    return rows


def write_events(folder: Path, record: SpectrumRecord) -> None:
    """Write a record as a TensorBoard run, with the tags and steps of a training run."""
    with SummaryWriter(str(folder)) as writer:
        for index in range(len(record)):
            values = measured_scalars(record, index, record.matrices[0]) | predicted_scalars(record, index)
            for tag, value in values.items():
                writer.add_scalar(tag, value, int(record.steps[index]))
