"""Spectra of a run: the record that is measured, saved, loaded and plotted."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from stepwise_lightning.errors import NotFoundError, UserError, reason
from stepwise_lightning.files import atomic_write_stream
from stepwise_lightning.spectrum import exchange
from stepwise_lightning.spectrum.steps import Steps, detect_steps, num_grown

_PREDICTED = "cross_correlation/predicted"
_RENAMED = {"num_learned": "num_grown"}  # measures of version 0.1


@dataclass
class Spectrum:
    """Spectrum of one matrix: eigenvalues (d,), descending, and rank measures by name."""

    eigenvalues: Tensor
    measures: dict[str, float] = field(default_factory=dict)

    @property
    def num_grown(self) -> int:
        """Number of grown modes; 0 if unknown, because the dimension has changed since the first measurement."""
        count = self.measures.get("num_grown", math.nan)
        return 0 if math.isnan(count) else int(count)


@dataclass
class Measurement:
    """Spectra by matrix after ``step`` optimiser steps; ``time`` is the sum of their learning rates.

    ``loss`` is the training loss of the next step (NaN if unknown), ``predicted`` the eigenvalues of C predicted by
    theory, (d,), and ``embeddings`` those of the module, (views, n, d).
    """

    step: int
    time: float
    loss: float = math.nan
    spectra: dict[str, Spectrum] = field(default_factory=dict)
    predicted: Tensor | None = None
    embeddings: Tensor | None = None


class SpectrumRecord:
    """Record of T measurements in order of time; ``SpectrumRecord.load(folder)`` loads one from a finished run.

    Matrices have names: ``cross_correlation``, ``covariance``, … for the embeddings of the module
    (:class:`stepwise_lightning.SpectrumLogger` defines them), ``encoder.backbone.covariance`` for the output of a
    submodule. Values that were not measured, for instance because a run was resumed with other settings, are NaN.
    Tensors are float64 on the CPU, except steps (int64) and embeddings (float32).

    ``docs/glossary.md`` defines step, time, mode, grown, learned, distinct step and stepwiseness.

    Attributes:
        expected_times: by matrix, times at which a forecast expects modes to be learned; not saved.

    """

    def __init__(self) -> None:
        self._measurements: list[Measurement] = []
        self.expected_times: dict[str, list[float]] = {}

    @classmethod
    def of(
        cls,
        times: Tensor,
        eigenvalues: Tensor,
        losses: Tensor | None = None,
        matrix: str = "cross_correlation",
        steps: Tensor | None = None,
    ) -> Self:
        """Return a record of one matrix from times (T,), eigenvalues (T, d), losses (T,) and steps (T,).

        Losses default to NaN, steps to 0, 1, 2, ….

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
        """Load the record of a finished run from its folder, ``runs/<name>/<version>``, or its ``spectrum.npz``.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is damaged or contains no spectra. No code in it is executed.

        """
        file = Path(path, "spectrum.npz") if os.path.isdir(path) else Path(path)
        if not file.is_file():
            raise NotFoundError(f"no file {str(file)!r}: pass a spectrum.npz, or the folder of a finished run")
        try:
            # NumPy leaves a damaged zip file open, hence the explicit stream.
            with file.open("rb") as stream, np.load(stream, allow_pickle=False) as saved:
                arrays = {name: np.asanyarray(saved[name]) for name in saved}  # bytes for a damaged name
        except Exception as error:  # NumPy, zipfile and zlib raise many types
            raise UserError(f"{str(file)!r} cannot be read as spectra ({reason(error)}): train again") from error
        lengths = {len(values) if values.ndim else None for values in arrays.values()}
        numeric = all(values.dtype.kind in "iuf" for values in arrays.values())
        if not ({"step", "time", "loss"} <= arrays.keys() and numeric and len(lengths) == 1 and None not in lengths):
            raise UserError(f"{str(file)!r} holds no spectra: expected step, time, loss, eigenvalues of one length")
        return cls.from_arrays(arrays)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> Self:
        """Return the record of :meth:`arrays`, given as NumPy arrays or tensors."""
        record = cls()
        tensors = {name: torch.as_tensor(values).detach().cpu() for name, values in arrays.items()}
        steps, times, losses = (tensors.pop(name).tolist() for name in ("step", "time", "loss"))
        record._measurements = [Measurement(*values) for values in zip(steps, times, losses, strict=True)]
        embeddings, predicted = tensors.pop("embeddings", None), tensors.pop(_PREDICTED, None)
        for index, measurement in enumerate(record._measurements):
            measurement.embeddings = None if embeddings is None else embeddings[index].clone()
            measurement.predicted = None if predicted is None else predicted[index].double().clone()
        for name, values in sorted(tensors.items(), key=lambda item: "/" in item[0]):  # eigenvalues first
            matrix, _, measure = name.partition("/")
            for index, measurement in enumerate(record._measurements):
                if not measure and not (values.shape[1] and values[index].isnan().all()):  # all NaN: not measured
                    known = ~values[index].isnan()
                    measurement.spectra[matrix] = Spectrum(values[index][known].double().clone())
                elif measure and matrix in measurement.spectra:
                    measurement.spectra[matrix].measures[_RENAMED.get(measure, measure)] = float(values[index])
        return record

    def __len__(self) -> int:
        return len(self._measurements)

    @property
    def measurements(self) -> Sequence[Measurement]:
        """All measurements, in order of time."""
        return self._measurements

    @property
    def steps(self) -> Tensor:
        """Number of optimiser steps before each measurement, (T,)."""
        return torch.tensor([m.step for m in self._measurements], dtype=torch.int64, device="cpu")

    @property
    def times(self) -> Tensor:
        """Learning rate × steps, (T,)."""
        return torch.tensor([m.time for m in self._measurements], dtype=torch.float64, device="cpu")

    @property
    def losses(self) -> Tensor:
        """Training loss of the step after each measurement, (T,); NaN if unknown, as at the end of training."""
        return torch.tensor([m.loss for m in self._measurements], dtype=torch.float64, device="cpu")

    @property
    def matrices(self) -> list[str]:
        """Names of the measured matrices."""
        return list(dict.fromkeys(name for m in self._measurements for name in m.spectra))

    @property
    def predicted(self) -> Tensor | None:
        """Eigenvalues of C predicted by theory, (T, d); None without a prediction."""
        return _stack([m.predicted for m in self._measurements])

    def eigenvalues(self, matrix: str = "cross_correlation") -> Tensor:
        """Return the eigenvalues of a matrix, (T, d), descending.

        Raises:
            ValueError: the matrix was not measured (the error lists the measured ones).

        """
        stacked = _stack([spectrum.eigenvalues if spectrum else None for spectrum in self._spectra(matrix)])
        assert stacked is not None
        return stacked

    def measures(self, matrix: str = "cross_correlation") -> list[str]:
        """Return the names of the rank measures of a matrix; ValueError if it was not measured."""
        return list(dict.fromkeys(name for s in self._spectra(matrix) if s for name in s.measures))

    def measure(self, measure: str, matrix: str = "cross_correlation") -> Tensor:
        """Return a rank measure of a matrix, such as ``effective_rank`` or ``num_grown``, (T,).

        Raises:
            ValueError: it was not measured (the error lists the measured ones).

        """
        if measure not in self.measures(matrix):
            choice = ", ".join(self.measures(matrix))
            raise UserError(f"no measure {measure!r} of {matrix!r} in this record; choose from: {choice}")
        values = [s.measures.get(measure, math.nan) if s else math.nan for s in self._spectra(matrix)]
        return torch.tensor(values, dtype=torch.float64, device="cpu")

    def embeddings(self, index: int) -> Tensor:
        """Return the embeddings of the module at one measurement, (views, n, d); ValueError if they were not kept."""
        embeddings = self._measurements[index].embeddings
        if embeddings is None:
            raise UserError("no embeddings in this record: measure with SpectrumLogger(keep_embeddings=True)")
        return embeddings

    def detect_steps(self, matrix: str = "cross_correlation", threshold: float | None = None) -> Steps:
        """Return the steps in the eigenvalues of a matrix: :func:`stepwise_lightning.spectrum.detect_steps`.

        Of several measurements at one time (learning rate 0) the last is used. Measurements without this matrix and
        modes that some measurements lack are excluded.

        Raises:
            ValueError: the matrix was measured less than twice.

        """
        times, values = self.times, self.eigenvalues(matrix)
        known = values.isfinite().any(1) if values.shape[1] else values.new_ones(len(values), dtype=torch.bool)
        times, values = times[known], values[known]
        moves = torch.cat([times.diff() > 0, times.new_ones(min(1, len(times)), dtype=torch.bool)])
        times, values = times[moves], values[moves]
        common = int(values.isfinite().all(0).sum())
        steps, missing = detect_steps(times, values[:, :common], threshold), (0, values.shape[1] - common)
        padded = [torch.nn.functional.pad(per_mode, missing, value=math.nan) for per_mode in steps[:2]]
        return steps._replace(step_times=padded[0], rise_widths=padded[1])

    def append(self, measurement: Measurement) -> None:
        """Append a measurement and add ``num_grown`` to its spectra."""
        for matrix, spectrum in measurement.spectra.items():
            first = next((m.spectra[matrix] for m in self._measurements if matrix in m.spectra), spectrum)
            if first.eigenvalues.shape == spectrum.eigenvalues.shape:
                grown = num_grown(first.eigenvalues, spectrum.eigenvalues)
                spectrum.measures = {"num_grown": float(grown)} | spectrum.measures
        self._measurements.append(measurement)

    def set_loss(self, loss: float) -> None:
        """Set the loss of the last measurement."""
        self._measurements[-1].loss = loss

    def predict(self, predicted: Tensor) -> None:
        """Set the predicted eigenvalues of C of all measurements, (T, d)."""
        for measurement, values in zip(self._measurements, predicted.detach().cpu(), strict=True):
            measurement.predicted = values

    def keep(self, count: int) -> None:
        """Keep only the first ``count`` measurements."""
        del self._measurements[count:]

    def arrays(self) -> dict[str, Tensor]:
        """Return all measurements as tensors by name, the content of ``spectrum.npz``; T is the first dimension.

        ``step``, ``time``, ``loss`` (T,); eigenvalues ``<matrix>`` (T, d) and rank measures ``<matrix>/<measure>``
        (T,); optionally ``cross_correlation/predicted`` (T, d) and ``embeddings`` (T, views, n, d), float32.
        """
        arrays = {"step": self.steps, "time": self.times, "loss": self.losses}
        for matrix in self.matrices:
            arrays[matrix] = self.eigenvalues(matrix)
            arrays |= {f"{matrix}/{name}": self.measure(name, matrix) for name in self.measures(matrix)}
        optional = {_PREDICTED: self.predicted, "embeddings": _stack([m.embeddings for m in self._measurements])}
        return arrays | {name: values for name, values in optional.items() if values is not None}

    to_dataframe, to_xarray = exchange.to_dataframe, exchange.to_xarray

    def save(self, path: str | Path) -> None:
        """Write :meth:`arrays` atomically to an ``.npz`` file; OSError if it cannot be written."""
        arrays: dict[str, Any] = {name: values.numpy() for name, values in self.arrays().items()}
        atomic_write_stream(path, lambda stream: np.savez(stream, **arrays))

    def _spectra(self, matrix: str) -> list[Spectrum | None]:
        """Return the spectrum of a matrix in each measurement, None if not measured."""
        if matrix not in self.matrices:
            raise UserError(f"no matrix {matrix!r} in this record; choose from: {', '.join(self.matrices) or 'none'}")
        return [measurement.spectra.get(matrix) for measurement in self._measurements]


def _stack(values: list[Tensor | None]) -> Tensor | None:
    """Stack tensors, padded with NaN to the largest; None entries become NaN. Return None without any tensor."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    shape = [max(sizes) for sizes in zip(*(value.shape for value in known), strict=True)]
    stacked = known[0].new_full((len(values), *shape), math.nan)
    for row, value in zip(stacked, values, strict=True):
        if value is not None:
            row[tuple(slice(size) for size in value.shape)] = value
    return stacked
