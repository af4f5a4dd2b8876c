"""Output of a run: ``spectrum.csv``, ``spectrum.npz``, ``steps.json``, ``trajectories.png`` and the loggers."""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from stepwise_lightning.callbacks.tensorboard import Charts, PrimaryMatrix
from stepwise_lightning.errors import UserError, reason
from stepwise_lightning.files import atomic_write, atomic_write_text, reserve
from stepwise_lightning.runs.folders import free_name
from stepwise_lightning.runs.loggers import logger_kind
from stepwise_lightning.spectrum.record import Measurement, SpectrumRecord

COLUMNS = ("step", "time", "matrix", "quantity", "mode", "value")
Row = tuple[int, float, str, str, int | str, float]
# Figures are redrawn during training after 500 times the seconds that the last drawing took.
_DRAWING_INTERVAL = 500
# Fewer measurements make no readable trajectories.png.
_MIN_MEASUREMENTS = 10


class RunFiles:
    """Writer of a growing record to files and loggers, on rank 0; ``fast_dev_run`` writes no files.

    If the folder contains ``spectrum.csv`` of another run, the files are named ``spectrum-v1.csv`` and so on.
    """

    def __init__(
        self, trainer: L.Trainer, module: L.LightningModule, folder: Path, name: str, record: SpectrumRecord, modes: int
    ) -> None:
        self._trainer, self._module, self._folder, self._name, self._modes = trainer, module, folder, name, modes
        self._charts: Charts | None = None  # created with the first measurement, which determines the matrices
        self._next_drawing = time.perf_counter() + _DRAWING_INTERVAL
        self._table: SpectrumTable | None = None
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._stem = free_name(name, lambda stem: _is_of_another_run(folder, stem, record))
            if self._stem != name:
                rank_zero_info(f"{folder / name}.csv belongs to another run: this run writes {self._stem}.csv")
            measured = (row for index in range(len(record)) for row in rows(record, index, modes))
            self._table = SpectrumTable(folder / f"{self._stem}.csv", measured)

    def add(self, record: SpectrumRecord) -> None:
        """Write the last measurement, and redraw the trajectories at intervals."""
        if self._table is not None:
            self._table.add(rows(record, -1, self._modes))
        if self._charts is None:
            primary = PrimaryMatrix.of(self._module, record.matrices)
            self._charts = Charts(self._trainer, primary, self._name, self._modes)
        self._charts.add(record)
        if time.perf_counter() > self._next_drawing:
            start = time.perf_counter()
            with _failure_as_warning("the trajectories are not drawn in TensorBoard"):
                self._charts.draw(record)
            self._next_drawing = time.perf_counter() + _DRAWING_INTERVAL * (time.perf_counter() - start)

    def add_loss(self, record: SpectrumRecord) -> None:
        """Write the loss of the last measurement, which is known one step later."""
        if self._charts is not None:
            self._charts.add_loss(record)
        if self._table is not None:
            self._table.add([_loss_row(record.measurements[-1])])

    def draw(self, record: SpectrumRecord) -> Path | None:
        """Draw the figures of a finished run and log them; return the path of ``trajectories.png``, if it is drawn.

        A figure that fails raises a warning. So does a logger that does not accept it.
        """
        path = self._path("trajectories", ".png") if self._table is not None else None
        picture: bytes | None = None
        if path is not None:
            with _failure_as_warning(f"{path.name} is not drawn"):
                picture = _picture(record, path)
        if (charts := self._charts) is not None:
            with _failure_as_warning("the number of distinct steps is not logged"):
                charts.add_num_distinct(record)
            with _failure_as_warning("the trajectories are not drawn in TensorBoard"):
                charts.draw(record, ended=True, picture=picture)
        if path is None or picture is None:
            return None
        for logger in self._trainer.loggers:
            with _failure_as_warning(f"{type(logger).__name__} does not accept {path.name}"):
                _log_picture(logger, path, f"{self._name}/trajectories")
        return path

    def location(self, num_measurements: int, picture: Path | None) -> str:
        """Return a line with the folder and the names of the results, '' under ``fast_dev_run``."""
        if self._table is None:
            return ""
        files = [self._table.path.name, self._path("steps", ".json").name, *([picture.name] if picture else [])]
        return f"{num_measurements} measured spectra are in {self._folder}: {', '.join(files)}"

    def close(self, record: SpectrumRecord, ended: bool = False) -> None:
        """Write ``spectrum.npz``, and ``steps.json`` if training has ended."""
        if self._charts is not None:
            self._charts.close()
        if self._table is not None:
            if ended:
                write_steps(self._path("steps", ".json"), record)
            record.save(self._folder / f"{self._stem}.npz")

    def _path(self, content: str, suffix: str) -> Path:
        """Return the path of another file of this run: ``steps.json``, ``steps-v1.json`` or ``<name>_steps.json``."""
        stem = self._stem.replace("spectrum", content, 1)
        return self._folder / f"{stem if stem != self._stem else f'{self._stem}_{content}'}{suffix}"


class SpectrumTable:
    """``spectrum.csv``: begins with the rows of a resumed run, and is replaced atomically by a longer table."""

    def __init__(self, path: Path, rows: Iterable[Row] = ()) -> None:
        self.path, self._content = path, BytesIO()
        self._text = TextIOWrapper(self._content, "utf-8", newline="")
        csv.writer(self._text).writerow(COLUMNS)
        self.add(rows)

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows and write the file."""
        csv.writer(self._text).writerows(map(_with_all_digits, rows))
        self._text.flush()
        # Not appended to the file: a kill could truncate a number unnoticed.
        atomic_write(self.path, lambda partial: partial.write_bytes(self._content.getbuffer()))


def rows(record: SpectrumRecord, index: int, num_modes: int | None = None) -> list[Row]:
    """Return one measurement as rows of ``spectrum.csv``, with the first ``num_modes`` eigenvalues of each matrix.

    A row ``grown_at``, whose value is the time, marks a mode that has grown since the previous measurement.
    """
    measurement = record.measurements[index]
    earlier = record.measurements[: index % len(record)]
    head = (measurement.step, measurement.time)
    rows: list[Row] = []
    for matrix, spectrum in measurement.spectra.items():
        rows += [(*head, matrix, name, "", value) for name, value in spectrum.measures.items()]
        before = max((m.spectra[matrix].num_grown for m in earlier if matrix in m.spectra), default=0)
        rows += [(*head, matrix, "grown_at", mode, measurement.time) for mode in range(before, spectrum.num_grown)]
        shown = {"eigenvalue": spectrum.eigenvalues}
        if matrix == "cross_correlation" and measurement.predicted is not None:
            shown["predicted_eigenvalue"] = measurement.predicted
        for quantity, values in shown.items():
            rows += [(*head, matrix, quantity, mode, v) for mode, v in enumerate(values[:num_modes].tolist())]
    return rows if math.isnan(measurement.loss) else [*rows, _loss_row(measurement)]


def _loss_row(measurement: Measurement) -> Row:
    return measurement.step, measurement.time, "", "loss", "", measurement.loss


def _with_all_digits(row: Row) -> tuple[Any, ...]:
    return row[0], repr(row[1]), *row[2:-1], repr(row[-1])


def _is_of_another_run(folder: Path, stem: str, record: SpectrumRecord) -> bool:
    """Return False if the table contains the first measurement to the last digit; reserve a stem that is free."""
    table = folder / f"{stem}.csv"
    if not (table.exists() or (folder / f"{stem}.npz").exists()):
        return not reserve(table)
    if not (len(record) and table.exists()):
        return True
    first = record.measurements[0]
    largest = [
        (first.step, first.time, matrix, "eigenvalue", 0, spectrum.eigenvalues[0].item())
        for matrix, spectrum in first.spectra.items()
        if len(spectrum.eigenvalues)
    ]
    lines = {",".join(map(str, _with_all_digits(row))) for row in largest}
    return not lines <= set(table.read_text(encoding="utf-8", errors="replace").splitlines())


def write_steps(path: Path, record: SpectrumRecord) -> None:
    """Write the result of :meth:`SpectrumRecord.detect_steps` for each matrix as JSON; NaN becomes null."""
    document: dict[str, Any] = {}
    for matrix in record.matrices:
        try:
            steps = record.detect_steps(matrix)
        except ValueError as error:  # one measurement, or a learning rate of 0 throughout
            document[matrix] = {"undefined": str(error)}
            continue
        document[matrix] = {
            "num_distinct": steps.num_distinct,
            "num_plateaus": steps.num_plateaus,
            "num_learned": int(steps.num_learned[-1]),
            "stepwiseness": steps.stepwiseness,
            "threshold": steps.threshold,
            "step_times": _nan_to_none(steps.step_times.tolist()),
            "rise_widths": _nan_to_none(steps.rise_widths.tolist()),
        }
    atomic_write_text(path, json.dumps(document, indent=2) + "\n")


def _nan_to_none(values: list[float]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values]


def _picture(record: SpectrumRecord, path: Path) -> bytes | None:
    """Draw the trajectories of a finished run, write them to ``path`` and return the PNG; None if too short."""
    if len(record) < _MIN_MEASUREMENTS:
        return None
    from stepwise_lightning.plots import run_figure

    title = "/".join(path.parent.parts[-2:]).replace("$", r"\$")  # $ begins a formula
    figure = run_figure(record, title=title)
    content = BytesIO()
    figure.savefig(content, format="png", dpi=130)
    atomic_write(path, lambda partial: partial.write_bytes(content.getbuffer()))
    return content.getvalue()


@contextmanager
def _failure_as_warning(failure: str) -> Iterator[None]:
    """Warn of an error: a figure must not end a run."""
    try:
        yield
    except Exception as error:  # matplotlib and loggers raise many types
        rank_zero_warn(f"{failure}: {error if isinstance(error, UserError) else reason(error)}")


def _log_picture(logger: Any, path: Path, key: str) -> None:
    """Log a picture to W&B or MLflow; TensorBoard gets it from :class:`Charts`."""
    if logger_kind(logger) == "WandbLogger":
        logger.log_image(key=key, images=[str(path)])
    elif logger_kind(logger) == "MLFlowLogger":
        logger.experiment.log_artifact(logger.run_id, str(path), key.rpartition("/")[0])
