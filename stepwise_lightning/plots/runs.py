"""Figures of finished runs: one run with all its matrices, or several runs in common axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.lines import Line2D

from stepwise_lightning.errors import UserError
from stepwise_lightning.plots.panels import RUN_COLOURS, Figure, Panel, draw_panel, first_rise
from stepwise_lightning.plots.trajectories import trajectories_figure
from stepwise_lightning.spectrum.record import SpectrumRecord


def run_figure(record: SpectrumRecord, title: str = "", matrices: Sequence[str] | None = None) -> Figure:
    """Draw one run: loss above eigenvalues against log time, one column per matrix.

    Args:
        record: of the run.
        title: of the figure.
        matrices: names of the matrices; None for the matrices of the module's own embeddings.

    Raises:
        ValueError: an unknown matrix (the error lists the measured ones), or time that does not increase.

    """
    _check_time(record)
    panels = [Panel(record, matrix, _steps_title(record, matrix)) for matrix in matrices or embedding_matrices(record)]
    return trajectories_figure(panels, title=title, same_axes=False)


def overlay_figure(
    records: Mapping[str, SpectrumRecord], title: str = "", matrices: Sequence[str] | None = None
) -> Figure:
    """Draw several runs in common axes, one colour per run: loss above eigenvalues against log time.

    Args:
        records: by the name in the legend.
        title: of the figure.
        matrices: names of the matrices, one column each; None for the embedding matrices that all runs have.

    Raises:
        ValueError: no run, no common matrix, a run that lacks one, or time that does not increase.

    """
    if not records:
        raise UserError("no runs to draw")
    for record in records.values():
        _check_time(record)
    runs = list(records.values())
    common = [name for name in embedding_matrices(runs[0]) if all(name in run.matrices for run in runs)]
    if not (shown := list(matrices or common)):
        raise UserError(f"the runs {', '.join(records)} have no matrix in common")
    figure = Figure(figsize=(1.2 + 4.4 * len(shown), 6.2), layout="constrained")
    axes = figure.subplots(2, len(shown), sharex="col", squeeze=False)
    end = max(float(run.times[-1]) for run in runs)
    for column, matrix in enumerate(shown):
        starts = []
        for index, record in enumerate(runs):
            panel = Panel(record, matrix, step_times=())
            draw_panel(panel, axes[0, column], axes[1, column], RUN_COLOURS[index % len(RUN_COLOURS)])
            starts.append(first_rise(panel))
        axes[1, column].set(ylabel=panel.label, xlim=(min(starts), end))
    axes[0, 0].set_ylabel("loss")
    lines = [Line2D([], [], color=RUN_COLOURS[index % len(RUN_COLOURS)], linewidth=2.2) for index in range(len(runs))]
    figure.legend(lines, list(records), loc="outside lower center", ncols=min(len(runs), 3), frameon=False)
    figure.suptitle(title)
    return figure


def embedding_matrices(record: SpectrumRecord) -> list[str]:
    """Return the matrices of the module's own embeddings, or all matrices if only submodules were measured."""
    return [name for name in record.matrices if "." not in name] or record.matrices


def _check_time(record: SpectrumRecord) -> None:
    if len(record) < 2:
        raise UserError(f"trajectories need at least two measurements, got {len(record)}: train longer")
    if not (record.times.diff() > 0).all():
        raise UserError("time (learning rate × step) does not increase: the learning rate was 0 at some steps")


def _steps_title(record: SpectrumRecord, matrix: str) -> str:
    try:
        count = record.detect_steps(matrix).num_distinct
    except ValueError:  # measured less than twice, after resuming with other settings
        return ""
    # No steps are counted in a matrix that starts large, such as the normalised covariance.
    return f"{count} distinct step{'' if count == 1 else 's'}" if count else ""
