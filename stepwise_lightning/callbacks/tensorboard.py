"""What a run's loggers get: scalars in groups, and on TensorBoard's pages charts, pictures and a table of settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from stepwise_lightning.runs.loggers import tensorboard_writer, tensorboard_writers
from stepwise_lightning.spectrum.matrices import tag_prefix
from stepwise_lightning.spectrum.record import SpectrumRecord

NAME = "spectrum"  # of a logger; another name is put before the groups
# Sorts before the names of all matrices, so that it is what TensorBoard shows first.
GLANCE = "At a glance"
SUBMODULE_MODES = 16  # eigenvalues of a submodule that become scalars and lines
_MODE_CHARTS = 8


@dataclass(frozen=True)
class Lead:
    """The matrix to look at first, and the class whose loss drives it: ``""`` where that is not known."""

    matrix: str
    driver: str = ""

    @classmethod
    def of(cls, module: L.LightningModule, matrices: list[str]) -> Lead:
        """Return what ``module.driven_matrix`` says, if that was measured; else the first matrix."""
        driven = getattr(module, "driven_matrix", None)
        return cls(driven, type(module).__name__) if driven in matrices else cls(matrices[0])

    @property
    def title(self) -> str:
        """What charts of it are called."""
        return group(self.matrix) + (f", driven by {self.driver}" if self.driver else "")


def group(matrix: str, name: str = NAME) -> str:
    """Return what comes before a quantity in its tag, such as ``C`` or ``encoder.backbone/covariance``."""
    return tag_prefix(matrix) if name == NAME else f"{name}/{tag_prefix(matrix)}"


def glance(quantity: str, name: str = NAME) -> str:
    """Return the tag of a quantity that stands for the run: ``At a glance/loss``."""
    return f"{'' if name == NAME else f'{name}/'}{GLANCE}/{quantity}"


def distinct(name: str = NAME) -> str:
    """Return the tag of the number of distinct steps, which is known when a run has ended."""
    return f"{'' if name == NAME else f'{name}/'}steps/num_distinct"


def scalars(record: SpectrumRecord, index: int, lead: str, name: str = NAME, num_modes: int | None = None) -> dict:
    """Return what one measurement says, by tag: ``C/eig_000``, ``C/num_grown``, …; the theory's ``C/predicted_000``.

    Args:
        record: of the run.
        index: of the measurement.
        lead: the matrix whose ``num_grown`` is shown at a glance, beside the loss.
        name: of the logger.
        num_modes: how many eigenvalues of a matrix, of a submodule's :data:`SUBMODULE_MODES` at the most; None for all.

    """
    values: dict[str, float] = {}
    for _, _, matrix, quantity, mode, value in record.rows(index, num_modes):
        short = {"eigenvalue": "eig", "predicted_eigenvalue": "predicted"}.get(quantity, quantity)
        if quantity == "loss":
            values[glance("loss", name)] = value
        elif mode == "":
            values[f"{group(matrix, name)}/{short}"] = value
        elif quantity != "grown_at" and ("." not in matrix or int(mode) < SUBMODULE_MODES):
            values[f"{group(matrix, name)}/{short}_{mode:03d}"] = value
        if matrix == lead and quantity == "num_grown":
            values[glance(quantity, name)] = value
    return values


def as_theory(values: Mapping[str, float]) -> dict[str, float]:
    """Return what theory says under the tags of what it says it of: a run of its own, with a colour of its own."""
    return {tag.replace("/predicted_", "/eig_"): value for tag, value in values.items() if "/predicted_" in tag}


class Charts:
    """What the loggers of a Trainer get of a record that grows; on rank 0 alone.

    TensorBoard shows theory as another run, ``theory`` in the folder of this one.
    """

    def __init__(self, trainer: L.Trainer, lead: Lead, name: str, num_modes: int) -> None:
        self._trainer, self._lead, self._name, self._num_modes = trainer, lead, name, num_modes
        self._theory: dict[str, Any] = {}

    def add(self, record: SpectrumRecord) -> None:
        """Add the last measurement, and before the first one the layout of the page of custom scalars."""
        if len(record) == 1:
            modes = min(record.eigenvalues(self._lead.matrix).shape[1], _MODE_CHARTS, self._num_modes)
            for board in tensorboard_writers(self._trainer):
                board.add_custom_scalars(layout(record.matrices, self._lead, self._name, modes))
        values, step = scalars(record, -1, self._lead.matrix, self._name, self._num_modes), int(record.steps[-1])
        theory = as_theory(values)
        measured = {tag: value for tag, value in values.items() if "/predicted_" not in tag}
        for logger in self._trainer.loggers:
            board = tensorboard_writer(logger)
            logger.log_metrics(values if board is None else measured, step=step)
            if board is not None and theory:
                self._add_theory(board, theory, step)

    def add_loss(self, record: SpectrumRecord) -> None:
        """Add the loss of the last measurement, which is known later."""
        for logger in self._trainer.loggers:
            logger.log_metrics({glance("loss", self._name): float(record.losses[-1])}, step=int(record.steps[-1]))

    def _add_theory(self, board: Any, values: dict[str, float], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here, because it takes long

        folder = str(Path(board.log_dir, "theory"))
        if folder not in self._theory:  # what an earlier part of this run wrote from here on is void
            self._theory[folder] = SummaryWriter(folder, purge_step=step)
        for tag, value in values.items():
            self._theory[folder].add_scalar(tag, value, step)

    def draw(self, record: SpectrumRecord, due: Mapping[str, Sequence[float]], ended: bool = False) -> None:
        """Draw the trajectories of each matrix, with steps found and times ``due`` by forecast, for TensorBoard."""
        writers = tensorboard_writers(self._trainer)
        if not writers or len(record) < 3:
            return
        if not (record.times.diff() > 0).all():
            rank_zero_warn("no trajectories are drawn: the learning rate was 0, so that time stood still")
            return
        for matrix in record.matrices:
            try:
                figure = self._figure(record, matrix, ended, due.get(matrix, ()))
            except ValueError:  # measured less than twice, since a run goes on with other settings
                continue
            leads = matrix == self._lead.matrix
            tag = glance("trajectories", self._name) if leads else f"{group(matrix, self._name)}/trajectories"
            for board in writers:
                board.add_figure(tag, figure, int(record.steps[-1]))

    def end(self, record: SpectrumRecord, due: Mapping[str, Sequence[float]]) -> None:
        """Add the number of distinct steps, which can be said of a run that has ended, and draw it."""
        try:
            count = record.detect_steps(self._lead.matrix).num_distinct
        except ValueError:  # too short
            return
        for logger in self._trainer.loggers:
            logger.log_metrics({distinct(self._name): float(count)}, step=int(record.steps[-1]))
        self.draw(record, due, ended=True)

    def close(self) -> None:
        """Write what is still to be written of the theory."""
        for writer in self._theory.values():
            writer.close()
        self._theory = {}

    def _figure(self, record: SpectrumRecord, matrix: str, ended: bool, due: Sequence[float]) -> Any:
        from stepwise_lightning.plots import Panel, eigenvalues_figure

        leads, hidden = matrix == self._lead.matrix, "." in matrix
        num_modes = min(self._num_modes, SUBMODULE_MODES) if hidden else self._num_modes
        # A hidden representation starts large: what is to be seen in it is what it does at the steps of the embedding.
        steps = record.detect_steps(self._lead.matrix if hidden else matrix)
        if not ended:
            title = f"{int(record.measure('num_grown', matrix)[-1])} modes grown at step {int(record.steps[-1])}"
        elif hidden and not leads and "." not in self._lead.matrix:
            title = f"beside the steps of {group(self._lead.matrix)}"
        elif steps.num_distinct or not int(steps.num_learned[-1]):
            title = f"{steps.num_distinct} distinct step{'s' * (steps.num_distinct != 1)}"
        else:
            title = "modes start large: no steps counted"
        panel = Panel(record, matrix, title, step_times=steps.step_times, num_modes=num_modes, due=due)
        name = self._lead.title if leads else group(matrix)
        figure = eigenvalues_figure([[panel]], [""], title=name)
        # Small, so that letters can be read where TensorBoard makes a thumbnail of it; sharp where it does not.
        figure.set_size_inches(4.8, 3.6)
        figure.set_dpi(200)
        return figure


def layout(matrices: Iterable[str], lead: Lead, name: str, modes: int) -> dict[str, dict[str, list[Any]]]:
    """Return what TensorBoard's page of custom scalars shows, by category and chart.

    Its lines have the colour of their run. So there is a chart for each of the first modes of the matrix to look at
    first, with one line a run, before those with all eigenvalues of a matrix.
    """

    def chart(*tags: str) -> list[Any]:
        return ["Multiline", [f"^{tag}$" for tag in tags]]

    first, prefix = group(lead.matrix, name), "" if name == NAME else f"{name}: "
    categories = {
        f"{prefix}{GLANCE}": {
            "loss": chart(glance("loss", name)),
            "modes grown": chart(glance("num_grown", name)),
            lead.title: chart(f"{first}/eig_[0-9]+"),
        },
        f"{prefix}{group(lead.matrix)}, mode by mode": {
            f"mode {mode}": chart(f"{first}/eig_{mode:03d}") for mode in range(modes)
        },
    }
    for matrix in matrices:
        submodule, _, kind = matrix.rpartition(".")
        category = categories.setdefault(f"{prefix}{submodule or 'embedding'}, all eigenvalues", {})
        category[tag_prefix(kind)] = chart(f"{group(matrix, name)}/eig_[0-9]+")
    return {category: charts for category, charts in categories.items() if charts}


def log_settings(trainer: L.Trainer, settings: Mapping[str, bool | float | str], name: str = NAME) -> None:
    """Add a run's settings to TensorBoard's table of hyperparameters, beside its loss, its modes and its steps."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from torch.utils.tensorboard.summary import hparams

    titles = {
        glance("loss", name): "final loss",
        glance("num_grown", name): "modes grown",
        distinct(name): "distinct steps",
    }
    experiment, start, _ = hparams(dict(settings), dict.fromkeys(titles, 0.0))
    data = experiment.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(data.content)
    for metric in content.experiment.metric_infos:
        metric.display_name = titles[metric.name.tag]
    data.content = content.SerializeToString()
    for board in tensorboard_writers(trainer):
        for summary in (experiment, start):
            board._get_file_writer().add_summary(summary)
