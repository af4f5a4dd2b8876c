"""The files that SpectrumLogger leaves behind: a table, the arrays and the steps found."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from stepwise_lightning.files import atomic_write, atomic_write_text
from stepwise_lightning.runs.folders import free_name
from stepwise_lightning.spectrum.record import COLUMNS, Row, SpectrumRecord


class SpectrumTable:
    """``spectrum.csv``, which grows while training goes on: each time it is replaced by a longer one.

    It begins with the rows that a resumed run has already, whatever the file held before.

    Raises:
        OSError: it cannot be written (here or later).

    """

    def __init__(self, path: Path, rows: Iterable[Row] = ()) -> None:
        self.path, self._content = path, BytesIO()
        self._text = TextIOWrapper(self._content, "utf-8", newline="")
        csv.writer(self._text).writerow(COLUMNS)
        self.add(rows)

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows; when this returns, they are on the disk."""
        csv.writer(self._text).writerows(map(_exactly, rows))
        self._text.flush()
        # Not appended to the file: a kill could cut a number short, which nobody would notice.
        atomic_write(self.path, lambda partial: partial.write_bytes(self._content.getbuffer()))


def _exactly(row: Row) -> tuple[Any, ...]:
    return row[0], repr(row[1]), *row[2:-1], repr(row[-1])


def write_steps(path: Path, record: SpectrumRecord) -> None:
    """Write what :func:`stepwise_lightning.spectrum.detect_steps` finds in each matrix as JSON; null stands for NaN.

    For each matrix: ``num_distinct``, ``num_learned`` (at the end), ``stepwiseness``, ``threshold``, and for each mode
    ``step_times`` and ``rise_widths``, in time (learning rate × steps).

    Raises:
        OSError: it cannot be written.

    """
    document: dict[str, Any] = {}
    for matrix in record.matrices:
        try:
            steps = record.detect_steps(matrix)
        except ValueError as error:  # a run of one measurement, or whose learning rate was 0 throughout
            document[matrix] = {"undefined": str(error)}
            continue
        document[matrix] = {
            "num_distinct": steps.num_distinct,
            "num_learned": int(steps.num_learned[-1]),
            "stepwiseness": steps.stepwiseness,
            "threshold": steps.threshold,
            "step_times": _without_nan(steps.step_times.tolist()),
            "rise_widths": _without_nan(steps.rise_widths.tolist()),
        }
    atomic_write_text(path, json.dumps(document, indent=2) + "\n")


def _without_nan(values: list[float]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values]


class SpectrumFiles:
    """The files of one run: ``spectrum.csv`` while it goes on, ``spectrum.npz`` and ``steps.json`` when it is over.

    Where another run has written files of these names, they stay, and these are called ``spectrum-v1.csv`` and so on.
    """

    def __init__(self, folder: Path, name: str, record: SpectrumRecord, num_modes: int) -> None:
        self.folder, self._record = folder, record
        self.stem = free_name(name, self._is_of_another_run)
        if self.stem != name:
            rank_zero_info(f"{folder / name}.csv is of another run, and stays: this one writes {self.stem}.csv")
        rows = (row for index in range(len(record)) for row in record.rows(index, num_modes))
        self._table = SpectrumTable(folder / f"{self.stem}.csv", rows)

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows to the table."""
        self._table.add(rows)

    def close(self, record: SpectrumRecord, ended: bool) -> None:
        """Write the arrays and, if training has ended, the steps found in them."""
        if ended:
            write_steps(self.named("steps", ".json"), record)
        record.save(self.folder / f"{self.stem}.npz")

    def named(self, content: str, suffix: str) -> Path:
        """Return the path of another file of this run: ``steps.json``, ``steps-v1.json`` or ``<name>_steps.json``."""
        stem = self.stem.replace("spectrum", content, 1)
        return self.folder / f"{stem if stem != self.stem else f'{self.stem}_{content}'}{suffix}"

    def _is_of_another_run(self, stem: str) -> bool:
        table, arrays = (self.folder / f"{stem}{suffix}" for suffix in (".csv", ".npz"))
        if not (table.exists() or arrays.exists()):
            return False
        return not (len(self._record) and table.exists() and _begins(table, self._record))


def _begins(table: Path, record: SpectrumRecord) -> bool:
    """Return whether a table has the first measurement of a record, to the last digit: then both are of one run."""
    rows = {",".join(map(str, _exactly(row))) for row in record.rows(0, 1) if row[3] == "eigenvalue"}
    return rows <= set(table.read_text(encoding="utf-8", errors="replace").splitlines())
