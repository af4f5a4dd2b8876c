"""Scalars, charts and figures of a record in TensorBoard and other loggers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np

from stepwise_lightning.runs.loggers import tag_start, tensorboard_writer, tensorboard_writers
from stepwise_lightning.spectrum.matrices import tag_prefix
from stepwise_lightning.spectrum.record import SpectrumRecord

NAME = "spectrum"  # default name of a SpectrumLogger; other names are prepended to tags
# Sorts before the names of all matrices and is therefore the first group in TensorBoard.
OVERVIEW = "At a glance"
SUBMODULE_MODES = 16  # eigenvalues of a submodule that are logged and drawn
_MODE_CHARTS = 8


@dataclass(frozen=True)
class PrimaryMatrix:
    """Matrix that is shown first, and the class whose loss drives it (``""`` if unknown)."""

    matrix: str
    driver: str = ""

    @classmethod
    def of(cls, module: L.LightningModule, matrices: list[str]) -> PrimaryMatrix:
        """Return ``module.driven_matrix`` if it was measured, else the first matrix."""
        driven = getattr(module, "driven_matrix", None)
        return cls(driven, type(module).__name__) if driven in matrices else cls(matrices[0])

    @property
    def title(self) -> str:
        """Title of its charts."""
        return matrix_tag(self.matrix) + (f", driven by {self.driver}" if self.driver else "")


def matrix_tag(matrix: str, name: str = NAME) -> str:
    """Return the start of the tags of a matrix: ``C``, ``encoder.backbone/covariance``, ``<name>/C``."""
    return tag_prefix(matrix) if name == NAME else f"{name}/{tag_prefix(matrix)}"


def overview_tag(quantity: str, name: str = NAME) -> str:
    """Return the tag of a quantity of the whole run: ``At a glance/loss``."""
    return f"{'' if name == NAME else f'{name}/'}{OVERVIEW}/{quantity}"


def num_distinct_tag(name: str = NAME) -> str:
    """Return the tag of the number of distinct steps, which is logged at the end of a run."""
    return f"{'' if name == NAME else f'{name}/'}steps/num_distinct"


def num_shown(matrix: str, num_modes: int | None) -> int | None:
    """Return the number of eigenvalues of a matrix that are logged and drawn, at most; None for all."""
    if "." not in matrix:
        return num_modes
    return SUBMODULE_MODES if num_modes is None else min(num_modes, SUBMODULE_MODES)


def measured_scalars(
    record: SpectrumRecord, index: int, primary: str, name: str = NAME, num_modes: int | None = None
) -> dict[str, float]:
    """Return the scalars of one measurement by tag: ``C/eig_000``, ``C/num_grown``, ``At a glance/loss``, ….

    The overview has ``num_grown`` of the matrix ``primary``. Of each matrix there are ``num_modes`` eigenvalues, for
    submodules at most :data:`SUBMODULE_MODES`.
    """
    measurement = record.measurements[index]
    values: dict[str, float] = {}
    for matrix, spectrum in measurement.spectra.items():
        prefix = matrix_tag(matrix, name)
        for measure, value in spectrum.measures.items():
            values[f"{prefix}/{measure}"] = value
            if matrix == primary and measure == "num_grown":
                values[overview_tag(measure, name)] = value
        shown = spectrum.eigenvalues[: num_shown(matrix, num_modes)]
        values |= {f"{prefix}/eig_{mode:03d}": value for mode, value in enumerate(shown.tolist())}
    if not math.isnan(measurement.loss):
        values[overview_tag("loss", name)] = measurement.loss
    return values


def predicted_scalars(
    record: SpectrumRecord, index: int, name: str = NAME, num_modes: int | None = None, quantity: str = "predicted"
) -> dict[str, float]:
    """Return the predicted eigenvalues of C at one measurement by tag, ``C/<quantity>_000``, …."""
    predicted, prefix = record.measurements[index].predicted, matrix_tag("cross_correlation", name)
    values = [] if predicted is None else predicted[:num_modes].tolist()
    return {f"{prefix}/{quantity}_{mode:03d}": value for mode, value in enumerate(values)}


class Charts:
    """Writer of a growing record to the loggers of a Trainer, on rank 0.

    TensorBoard shows predictions as a separate run, ``theory``, in a folder of this name in the run folder.
    """

    def __init__(self, trainer: L.Trainer, primary: PrimaryMatrix, name: str, num_modes: int) -> None:
        self._trainer, self._primary, self._name, self._num_modes = trainer, primary, name, num_modes
        self._theory: dict[str, Any] = {}

    def add(self, record: SpectrumRecord) -> None:
        """Log the last measurement, and with the first one the layout of the custom scalars."""
        primary = self._primary
        if len(record) == 1:
            spectra = record.measurements[0].spectra
            counts = {name: len(spectra[name].eigenvalues[: num_shown(name, self._num_modes)]) for name in spectra}
            for writer, start in tensorboard_writers(self._trainer).items():
                add_layout(writer, layout(counts, primary, self._name), start)
        step, options = int(record.steps[-1]), (self._name, self._num_modes)
        measured = measured_scalars(record, -1, primary.matrix, *options)
        for logger in self._trainer.loggers:
            writer = tensorboard_writer(logger)
            if writer is None:
                logger.log_metrics(measured | predicted_scalars(record, -1, *options), step=step)
            else:
                logger.log_metrics(measured, step=step)
                predicted = predicted_scalars(record, -1, *options, quantity="eig")
                self._add_theory(writer, {tag_start(logger) + tag: value for tag, value in predicted.items()}, step)

    def add_loss(self, record: SpectrumRecord) -> None:
        """Log the loss of the last measurement, which is known one step later."""
        for logger in self._trainer.loggers:
            logger.log_metrics({overview_tag("loss", self._name): float(record.losses[-1])}, step=int(record.steps[-1]))

    def add_num_distinct(self, record: SpectrumRecord) -> None:
        """Log the number of distinct steps of a finished run."""
        if not len(record):
            return
        try:
            count = record.detect_steps(self._primary.matrix).num_distinct
        except ValueError:  # measured less than twice
            return
        for logger in self._trainer.loggers:
            logger.log_metrics({num_distinct_tag(self._name): float(count)}, step=int(record.steps[-1]))

    def draw(self, record: SpectrumRecord, ended: bool = False, picture: bytes | None = None) -> None:
        """Draw the trajectories of each matrix in TensorBoard; ``picture`` is a PNG for the primary matrix."""
        writers, step = tensorboard_writers(self._trainer), int(record.steps[-1]) if len(record) else 0
        if not writers or len(record) < 3 or not (record.times.diff() > 0).all():
            return
        for matrix in record.matrices:
            tag = f"{matrix_tag(matrix, self._name)}/trajectories"
            if matrix == self._primary.matrix:
                tag = overview_tag("trajectories", self._name)
                if picture is not None:
                    for writer, start in writers.items():
                        writer.add_image(start + tag, _pixels(picture), step, dataformats="HWC")
                    continue
            try:
                figure = self._figure(record, matrix, ended)
            except ValueError:  # measured less than twice, after resuming with other settings
                continue
            for writer, start in writers.items():
                writer.add_figure(start + tag, figure, step)

    def close(self) -> None:
        """Close the writers of the predictions."""
        for writer in self._theory.values():
            writer.close()
        self._theory = {}

    def _add_theory(self, writer: Any, values: dict[str, float], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        if not values:
            return
        folder = str(Path(writer.log_dir, "theory"))
        if folder not in self._theory:  # discards later events of a run that is resumed here
            self._theory[folder] = SummaryWriter(folder, purge_step=step)
        for tag, value in values.items():
            self._theory[folder].add_scalar(tag, value, step)

    def _figure(self, record: SpectrumRecord, matrix: str, ended: bool) -> Any:
        from stepwise_lightning.plots import Panel, eigenvalues_figure

        primary, hidden = self._primary, "." in matrix
        num_modes = num_shown(matrix, self._num_modes)
        # A hidden representation starts large: the steps of the embedding are marked in it.
        steps = record.detect_steps(primary.matrix if hidden else matrix)
        if not ended:
            title = (
                f"{int(record.measure('num_grown', matrix)[-1])} modes grown tenfold at step {int(record.steps[-1])}"
            )
        elif hidden and matrix != primary.matrix and "." not in primary.matrix:
            title = f"dotted: steps of {matrix_tag(primary.matrix)}"
        elif steps.num_distinct or not int(steps.num_learned[-1]):
            title = f"{steps.num_distinct} distinct step{'s' * (steps.num_distinct != 1)}"
        else:
            title = "modes start large: no steps counted"
        panel = Panel(record, matrix, title, step_times=steps.step_times, num_modes=num_modes)
        name = primary.title if matrix == primary.matrix else matrix_tag(matrix)
        figure = eigenvalues_figure([[panel]], [""], title=name)
        # Small, for readable letters in the thumbnails of TensorBoard; sharp when enlarged.
        figure.set_size_inches(4.8, 3.6)
        figure.set_dpi(200)
        return figure


def _pixels(picture: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(BytesIO(picture)).convert("RGB"))


def layout(counts: Mapping[str, int], primary: PrimaryMatrix, name: str) -> dict[str, dict[str, list[str]]]:
    """Return the tags of TensorBoard's custom scalars by category and chart.

    Lines have the colour of their run: the first charts show one mode of the primary matrix each, one line per run;
    the others show all eigenvalues of a matrix. ``counts`` is the number of logged eigenvalues by matrix.
    """

    def eigenvalues(matrix: str) -> list[str]:
        return [f"{matrix_tag(matrix, name)}/eig_{mode:03d}" for mode in range(counts[matrix])]

    modes, prefix = eigenvalues(primary.matrix), "" if name == NAME else f"{name}: "
    categories = {
        f"{prefix}{OVERVIEW}": {
            "loss": [overview_tag("loss", name)],
            "modes grown tenfold": [overview_tag("num_grown", name)],
            primary.title: modes,
        },
        f"{prefix}{matrix_tag(primary.matrix)}, mode by mode": {
            f"mode {mode}": [tag] for mode, tag in enumerate(modes[:_MODE_CHARTS])
        },
    }
    for matrix in counts:
        submodule, _, kind = matrix.rpartition(".")
        category = categories.setdefault(f"{prefix}{submodule or 'embedding'}, all eigenvalues", {})
        category[tag_prefix(kind)] = eigenvalues(matrix)
    shown = {
        category: {chart: tags for chart, tags in charts.items() if tags} for category, charts in categories.items()
    }
    return {category: charts for category, charts in shown.items() if charts}


def add_layout(writer: Any, categories: Mapping[str, Mapping[str, Sequence[str]]], start: str = "") -> None:
    """Write the layout of custom scalars, with ``start`` before each tag.

    Charts are of the kind "margin" with margins of zero, because TensorBoard smooths the lines of the other kind.
    """
    from tensorboard.plugins.custom_scalar import layout_pb2
    from torch.utils.tensorboard.summary import custom_scalars

    content = layout_pb2.Layout()
    for title, charts in categories.items():
        category = content.category.add(title=title)
        for name, tags in charts.items():
            margin = category.chart.add(title=name).margin
            for tag in tags:
                margin.series.add(value=start + tag, lower=start + tag, upper=start + tag)
    summary = custom_scalars({})
    summary.value[0].tensor.string_val[0] = content.SerializeToString()
    writer._get_file_writer().add_summary(summary)


def log_settings(trainer: L.Trainer, settings: Mapping[str, bool | float | str], name: str = NAME) -> None:
    """Add the settings of a run to TensorBoard's table of hyperparameters, next to final loss, modes and steps."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from torch.utils.tensorboard.summary import hparams

    for writer, start in tensorboard_writers(trainer).items():
        titles = {
            start + overview_tag("loss", name): "final loss",
            start + overview_tag("num_grown", name): "modes grown tenfold",
            start + num_distinct_tag(name): "distinct steps",
        }
        experiment, session, _ = hparams(dict(settings), dict.fromkeys(titles, 0.0))
        data = experiment.value[0].metadata.plugin_data
        content = HParamsPluginData.FromString(data.content)
        for metric in content.experiment.metric_infos:
            metric.display_name = titles[metric.name.tag]
        data.content = content.SerializeToString()
        for summary in (experiment, session):
            writer._get_file_writer().add_summary(summary)
