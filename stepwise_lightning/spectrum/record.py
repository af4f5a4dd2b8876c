"""What a run has measured: the one form in which it is kept, written, read back and drawn."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from stepwise_lightning.errors import NotFoundError, UserError, reason
from stepwise_lightning.files import atomic_write
from stepwise_lightning.spectrum.steps import Steps, detect_steps, num_grown

__all__ = ["COLUMNS", "Measurement", "Row", "Spectrum", "SpectrumRecord"]

COLUMNS = ("step", "time", "matrix", "quantity", "mode", "value")
# (step, time, matrix, quantity, mode, value)
Row = tuple[int, float, str, str, int | str, float]
_PREDICTED = "cross_correlation/predicted"
# Names that earlier versions wrote.
_RENAMED = {"num_learned": "num_grown"}


@dataclass
class Spectrum:
    """One matrix at one moment: its eigenvalues, (d,), descending, and measures of its rank by name."""

    eigenvalues: Tensor
    measures: dict[str, float] = field(default_factory=dict)


@dataclass
class Measurement:
    """What was measured after ``step`` optimiser steps; time is the sum of their learning rates.

    ``spectra`` by the name of their matrix; ``predicted`` are the theory's eigenvalues of C, (d,); ``embeddings`` those
    of the module itself, (views, n, d). The loss, of the batch that changes the weights next, is NaN where unknown.
    """

    step: int
    time: float
    loss: float = math.nan
    spectra: dict[str, Spectrum] = field(default_factory=dict)
    predicted: Tensor | None = None
    embeddings: Tensor | None = None


class SpectrumRecord:
    """What a run has measured, T measurements in the order of time; ``SpectrumRecord.load(folder)`` reads one back.

    Matrices go by name: ``cross_correlation``, ``covariance``, … of the module's own embeddings
    (:class:`stepwise_lightning.SpectrumLogger` defines them), ``encoder.backbone.covariance`` of what a submodule puts
    out. Where something was not measured, as when a run went on with other settings, there is NaN. All
    tensors are float64 on the CPU, but for steps (int64) and embeddings (float32).

    Words are defined in ``docs/glossary.md``: step, time, mode, grown, learned, distinct step, stepwiseness.
    """

    def __init__(self) -> None:
        self._measurements: list[Measurement] = []

    @classmethod
    def of(
        cls,
        times: Tensor,
        eigenvalues: Tensor,
        losses: Tensor | None = None,
        matrix: str = "cross_correlation",
        steps: Tensor | None = None,
    ) -> Self:
        """Return the record of one matrix, from times (T,), eigenvalues (T, d), losses (T,) and steps (T,).

        For what was measured by other means, or predicted. Without losses these are NaN; without steps they are
        0, 1, 2, …

        Example:
            >>> import torch
            >>> from stepwise_lightning import SpectrumRecord
            >>> times = torch.linspace(0, 40, 401)
            >>> modes = torch.sigmoid(torch.stack([2 * (times - 10), 2 * (times - 30)], dim=1))
            >>> record = SpectrumRecord.of(times, modes, losses=(1 - modes).square().sum(1))
            >>> record.matrices, record.eigenvalues().shape, record.detect_steps().num_distinct
            (['cross_correlation'], torch.Size([401, 2]), 2)

        """
        arrays = {
            "step": torch.arange(len(times)) if steps is None else steps,
            "time": times,
            "loss": torch.full((len(times),), math.nan) if losses is None else losses,
            matrix: eigenvalues,
        }
        return cls.from_arrays(arrays)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Return what a run has measured.

        Args:
            path: the folder of a run, ``runs/<name>/<version>``, or the ``spectrum.npz`` in it, which is written when
                training ends.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, or something else. Nothing in it is imported or run.

        """
        file = Path(path, "spectrum.npz") if os.path.isdir(path) else Path(path)
        if not file.is_file():
            raise NotFoundError(
                f"no {str(file)!r}: give a spectrum.npz, or the folder of a run whose training has ended"
            )
        try:
            # Opened here: NumPy leaves a damaged zip file open.
            with file.open("rb") as stream, np.load(stream, allow_pickle=False) as saved:
                arrays = {name: np.asanyarray(saved[name]) for name in saved}  # of a damaged name it gives bytes
        except Exception as error:  # NumPy, zipfile and zlib raise whatever they come across
            raise UserError(
                f"{str(file)!r} cannot be read as spectra ({reason(error)}): train the run again"
            ) from error
        lengths = {len(values) if values.ndim else None for values in arrays.values()}
        numbers = all(values.dtype.kind in "iuf" for values in arrays.values())
        if not ({"step", "time", "loss"} <= arrays.keys() and numbers and len(lengths) == 1 and None not in lengths):
            raise UserError(
                f"{str(file)!r} holds no spectra: expected step, time, loss and eigenvalues of equal length"
            )
        return cls.from_arrays(arrays)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> Self:
        """Return the record of :meth:`arrays`, NumPy's or torch's, of this version or an earlier one."""
        record = cls()
        tensors = {name: torch.as_tensor(values) for name, values in arrays.items()}
        steps, times, losses = (tensors.pop(name).tolist() for name in ("step", "time", "loss"))
        record._measurements = [Measurement(*moment) for moment in zip(steps, times, losses, strict=True)]
        embeddings, predicted = tensors.pop("embeddings", None), tensors.pop(_PREDICTED, None)
        for index, measurement in enumerate(record._measurements):
            measurement.embeddings = None if embeddings is None else embeddings[index].clone()
            measurement.predicted = None if predicted is None else predicted[index].double().clone()
        for name, values in sorted(tensors.items(), key=lambda item: "/" in item[0]):  # eigenvalues first
            matrix, _, measure = name.partition("/")
            for index, measurement in enumerate(record._measurements):
                if not measure and not (values.shape[1] and values[index].isnan().all()):  # or it was not measured
                    known = ~values[index].isnan()
                    measurement.spectra[matrix] = Spectrum(values[index][known].double().clone())
                elif measure and matrix in measurement.spectra:
                    measurement.spectra[matrix].measures[_RENAMED.get(measure, measure)] = float(values[index])
        return record

    @classmethod
    def from_version_0_1(cls, state: Mapping[str, Any]) -> Self:
        """Return the record in the state that the logger of version 0.1 left in a checkpoint."""
        arrays = {"step": state["steps"], "time": state["times"], "loss": state["losses"]}
        arrays |= state["eigenvalues"] | state["measures"]
        return cls.from_arrays(arrays if state["embeddings"] is None else arrays | {"embeddings": state["embeddings"]})

    def __len__(self) -> int:
        return len(self._measurements)

    @property
    def steps(self) -> Tensor:
        """Optimiser steps before each measurement, (T,)."""
        return torch.tensor([m.step for m in self._measurements], dtype=torch.int64)

    @property
    def times(self) -> Tensor:
        """Learning rate × steps, (T,)."""
        return torch.tensor([m.time for m in self._measurements], dtype=torch.float64)

    @property
    def losses(self) -> Tensor:
        """Of the training batch that the next step takes, (T,); NaN where there is none, as at the end."""
        return torch.tensor([m.loss for m in self._measurements], dtype=torch.float64)

    @property
    def matrices(self) -> list[str]:
        """Names of the matrices that were measured."""
        return list(dict.fromkeys(name for m in self._measurements for name in m.spectra))

    @property
    def predicted(self) -> Tensor | None:
        """The theory's eigenvalues of C, (T, d); None where there is no theory."""
        return _stacked([m.predicted for m in self._measurements])

    def eigenvalues(self, matrix: str = "cross_correlation") -> Tensor:
        """Return the eigenvalues of a matrix, (T, d), descending.

        Raises:
            ValueError: that matrix was not measured (the error lists those that were).

        """
        stacked = _stacked([spectrum.eigenvalues if spectrum else None for spectrum in self._spectra(matrix)])
        assert stacked is not None
        return stacked

    def measures(self, matrix: str = "cross_correlation") -> list[str]:
        """Return the names of what was measured of a matrix besides its eigenvalues; ValueError as there."""
        return list(dict.fromkeys(name for s in self._spectra(matrix) if s for name in s.measures))

    def measure(self, measure: str, matrix: str = "cross_correlation") -> Tensor:
        """Return a measure of a matrix, such as ``effective_rank`` or ``num_grown``, (T,).

        Raises:
            ValueError: it was not measured (the error lists what was).

        """
        if measure not in self.measures(matrix):
            choice = ", ".join(self.measures(matrix))
            raise UserError(f"no measure {measure!r} of {matrix!r} in this record; choose from: {choice}")
        values = [s.measures.get(measure, math.nan) if s else math.nan for s in self._spectra(matrix)]
        return torch.tensor(values, dtype=torch.float64)

    def embeddings(self, index: int) -> Tensor:
        """Return the module's embeddings at one measurement, (views, n, d).

        Raises:
            ValueError: they were not kept: ``SpectrumLogger(keep_embeddings=True)`` does.

        """
        kept = self._measurements[index].embeddings
        if kept is None:
            raise UserError("no embeddings in this record: measure with SpectrumLogger(keep_embeddings=True)")
        return kept

    def detect_steps(self, matrix: str = "cross_correlation") -> Steps:
        """Return the steps in the eigenvalues of a matrix: :func:`stepwise_lightning.spectrum.detect_steps`.

        Where time stood still, because the learning rate was 0, the last measurement counts; those without this matrix
        do not, nor do modes that some of them lack.

        Raises:
            ValueError: that matrix was not measured, or less than twice.

        """
        times, values = self.times, self.eigenvalues(matrix)
        known = values.isfinite().any(1) if values.shape[1] else torch.ones(len(values), dtype=torch.bool)
        times, values = times[known], values[known]
        moves = torch.cat([times.diff() > 0, times.new_ones(min(1, len(times)), dtype=torch.bool)])
        times, values = times[moves], values[moves]
        common = int(values.isfinite().all(0).sum())
        steps, missing = detect_steps(times, values[:, :common]), (0, values.shape[1] - common)
        padded = [torch.nn.functional.pad(per_mode, missing, value=math.nan) for per_mode in steps[:2]]
        return steps._replace(step_times=padded[0], rise_widths=padded[1])

    def append(self, measurement: Measurement) -> None:
        """Add a measurement and the ``num_grown`` of each spectrum."""
        for matrix, spectrum in measurement.spectra.items():
            first = next((m.spectra[matrix] for m in self._measurements if matrix in m.spectra), spectrum)
            if first.eigenvalues.shape == spectrum.eigenvalues.shape:
                grown = num_grown(first.eigenvalues, spectrum.eigenvalues)
                spectrum.measures = {"num_grown": float(grown)} | spectrum.measures
        self._measurements.append(measurement)

    def set_loss(self, loss: float) -> None:
        """Give the last measurement the loss of the batch that it was made on."""
        self._measurements[-1].loss = loss

    def predict(self, predicted: Tensor) -> None:
        """Set the theory's eigenvalues of C at all measurements, (T, d)."""
        for measurement, values in zip(self._measurements, predicted, strict=True):
            measurement.predicted = values

    def keep(self, count: int) -> None:
        """Keep the first measurements alone."""
        del self._measurements[count:]

    def rows(self, index: int, num_modes: int | None = None) -> list[Row]:
        """Return what one measurement says as rows of ``COLUMNS``: measures, growth, eigenvalues, and a loss if known.

        ``grown_at``, whose value is the time, says that the mode has grown since the measurement before. Of each
        spectrum the first ``num_modes`` eigenvalues become rows.
        """
        measurement = self._measurements[index]
        head = (measurement.step, measurement.time)
        rows: list[Row] = []
        for matrix, spectrum in measurement.spectra.items():
            rows += [(*head, matrix, name, "", value) for name, value in spectrum.measures.items()]
            now, before = spectrum.measures.get("num_grown", 0.0), self._most_grown_before(matrix, index)
            rows += [(*head, matrix, "grown_at", mode, measurement.time) for mode in range(before, int(now))]
            shown = {"eigenvalue": spectrum.eigenvalues}
            if matrix == "cross_correlation" and measurement.predicted is not None:
                shown["predicted_eigenvalue"] = measurement.predicted
            for quantity, values in shown.items():
                rows += [(*head, matrix, quantity, mode, v) for mode, v in enumerate(values[:num_modes].tolist())]
        return rows if math.isnan(measurement.loss) else [*rows, (*head, "", "loss", "", measurement.loss)]

    def arrays(self) -> dict[str, Tensor]:
        """Return everything by name, as ``spectrum.npz`` and checkpoints keep it; the first dimension of each is T.

        ``step``, ``time``, ``loss`` (T,); for each matrix its eigenvalues ``<matrix>`` (T, d) and each of its measures
        ``<matrix>/<measure>`` (T,); where they are known ``cross_correlation/predicted`` (T, d) and ``embeddings``
        (T, views, n, d), float32.
        """
        arrays = {"step": self.steps, "time": self.times, "loss": self.losses}
        for matrix in self.matrices:
            arrays[matrix] = self.eigenvalues(matrix)
            arrays |= {f"{matrix}/{name}": self.measure(name, matrix) for name in self.measures(matrix)}
        optional = {_PREDICTED: self.predicted, "embeddings": _stacked([m.embeddings for m in self._measurements])}
        return arrays | {name: values for name, values in optional.items() if values is not None}

    def save(self, path: Path) -> None:
        """Write :meth:`arrays` to an ``.npz`` file in one piece; OSError if it cannot be."""
        arrays = {name: values.numpy() for name, values in self.arrays().items()}
        atomic_write(path, lambda partial: np.savez(partial, **arrays))  # type: ignore[arg-type]

    def _spectra(self, matrix: str) -> list[Spectrum | None]:
        """Return each measurement's spectrum of a matrix, None where it was not measured."""
        if matrix not in self.matrices:
            raise UserError(f"no matrix {matrix!r} in this record; choose from: {', '.join(self.matrices) or 'none'}")
        return [measurement.spectra.get(matrix) for measurement in self._measurements]

    def _most_grown_before(self, matrix: str, index: int) -> int:
        earlier = (m.spectra[matrix].measures for m in self._measurements[:index] if matrix in m.spectra)
        return int(max((measures.get("num_grown", 0.0) for measures in earlier), default=0))


def _stacked(values: list[Tensor | None]) -> Tensor | None:
    """Stack what there is, padded to the largest with NaN, which also stands for what is missing; None for nothing."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    shape = [max(sizes) for sizes in zip(*(value.shape for value in known), strict=True)]
    stacked = known[0].new_full((len(values), *shape), math.nan)
    for row, value in zip(stacked, values, strict=True):
        if value is not None:
            row[tuple(slice(size) for size in value.shape)] = value
    return stacked
