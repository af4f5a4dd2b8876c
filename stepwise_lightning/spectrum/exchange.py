"""Records as data structures of pandas and xarray, which are imported only here."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from stepwise_lightning.errors import optional_import

if TYPE_CHECKING:
    import pandas
    import xarray


def to_dataframe(record: Any) -> pandas.DataFrame:
    """Return all measured numbers as a tidy table, one number per row; embeddings are excluded.

    Columns: ``step``, ``time`` (learning rate × steps), ``matrix`` (missing for the loss), ``quantity``
    (``eigenvalue``, ``predicted``, ``loss``, or the name of a rank measure), ``mode`` (from 0, missing unless an
    eigenvalue) and ``value``.

    Raises:
        UserError: pandas is not installed.

    """
    pandas = optional_import("pandas")
    rows: list[tuple[Any, ...]] = []
    for measurement in record.measurements:
        position = (measurement.step, measurement.time)
        rows.append((*position, None, "loss", None, measurement.loss))
        for matrix, spectrum in measurement.spectra.items():
            modes = enumerate(spectrum.eigenvalues.tolist())
            rows += [(*position, matrix, "eigenvalue", mode, value) for mode, value in modes]
            rows += [(*position, matrix, name, None, value) for name, value in spectrum.measures.items()]
        if measurement.predicted is not None:
            modes = enumerate(measurement.predicted.tolist())
            rows += [(*position, "cross_correlation", "predicted", mode, value) for mode, value in modes]
    table = pandas.DataFrame(rows, columns=["step", "time", "matrix", "quantity", "mode", "value"])
    return table.astype({"mode": "Int64"}).dropna(subset="value", ignore_index=True)


def to_xarray(record: Any) -> xarray.Dataset:
    """Return all measurements as a dataset with the dimensions ``measurement``, ``matrix`` and ``mode``.

    Variables: ``loss`` (measurement); ``eigenvalue`` (matrix, measurement, mode), NaN beyond the dimension of a matrix;
    each rank measure (matrix, measurement); optionally ``predicted`` (measurement, mode) for C, and ``embeddings``
    (measurement, view, sample, dimension). Coordinates of ``measurement``: ``step``, ``time`` (learning rate × steps).

    Raises:
        UserError: xarray is not installed.

    """
    xarray = optional_import("xarray")
    matrices = record.matrices
    eigenvalues = [record.eigenvalues(matrix) for matrix in matrices]
    width = max((values.shape[1] for values in eigenvalues), default=0)
    unknown = torch.full((len(record),), math.nan, dtype=torch.float64)
    variables: dict[str, tuple[Any, Tensor]] = {"loss": ("measurement", record.losses)}
    if matrices:
        padded = [pad(values, (0, width - values.shape[1]), value=math.nan) for values in eigenvalues]
        variables["eigenvalue"] = (("matrix", "measurement", "mode"), torch.stack(padded))
    for name in dict.fromkeys(name for matrix in matrices for name in record.measures(matrix)):
        known = [record.measure(name, matrix) if name in record.measures(matrix) else unknown for matrix in matrices]
        variables[name] = (("matrix", "measurement"), torch.stack(known))
    if record.predicted is not None:
        predicted = pad(record.predicted, (0, width - record.predicted.shape[1]), value=math.nan)
        variables["predicted"] = (("measurement", "mode"), predicted)
    embeddings = record.arrays().get("embeddings")
    if embeddings is not None:
        variables["embeddings"] = (("measurement", "view", "sample", "dimension"), embeddings)
    coordinates = {"matrix": matrices, "step": ("measurement", record.steps), "time": ("measurement", record.times)}
    return xarray.Dataset({name: (dims, values.numpy()) for name, (dims, values) in variables.items()}, coordinates)
