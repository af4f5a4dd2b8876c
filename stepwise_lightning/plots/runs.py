"""Pictures of finished runs: one with all its matrices, or several over each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.lines import Line2D

from stepwise_lightning.errors import UserError
from stepwise_lightning.plots.figures import Figure
from stepwise_lightning.plots.panels import Panel, draw_panel, first_rise
from stepwise_lightning.plots.trajectories import trajectories_figure
from stepwise_lightning.spectrum.record import SpectrumRecord

__all__ = ["overlay_figure", "run_figure"]

# Okabe and Ito's colours, which colour-blind readers can tell apart, without yellow.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def run_figure(
    record: SpectrumRecord,
    title: str = "",
    matrices: Sequence[str] | None = None,
    due: Mapping[str, Sequence[float]] | None = None,
) -> Figure:
    """Draw one run: loss above eigenvalues against log time, one column for each matrix of the module's own embeddings.

    Args:
        record: of the run.
        title: of the figure.
        matrices: other ones to draw.
        due: by matrix, times at which modes were forecast to be learned, which are marked.

    Raises:
        ValueError: an unknown matrix (the error lists those that there are), or time that stands still.

    """
    _check_time(record)
    panels = [
        Panel(record, matrix, _steps_found(record, matrix), due=(due or {}).get(matrix, ()))
        for matrix in matrices or own_matrices(record)
    ]
    return trajectories_figure(panels, title=title, same_axes=False)


def overlay_figure(
    records: Mapping[str, SpectrumRecord], title: str = "", matrices: Sequence[str] | None = None
) -> Figure:
    """Draw runs over each other, each in a colour of its own: loss above eigenvalues against log time.

    Args:
        records: by the names that the legend gives them.
        title: of the figure.
        matrices: which to draw, one column each; those of the modules' own embeddings that all runs have if None.

    Raises:
        ValueError: no run, one without such a matrix, none that all have, or time that stands still.

    """
    if not records:
        raise UserError("no runs to draw")
    for record in records.values():
        _check_time(record)
    runs = list(records.values())
    common = [name for name in own_matrices(runs[0]) if all(name in run.matrices for run in runs)]
    if not (shown := list(matrices or common)):
        raise UserError(f"the runs {', '.join(records)} have no matrix in common")
    figure = Figure(figsize=(1.2 + 4.4 * len(shown), 6.2), layout="constrained")
    axes = figure.subplots(2, len(shown), sharex="col", squeeze=False)
    end = max(float(run.times[-1]) for run in runs)
    for column, matrix in enumerate(shown):
        starts = []
        for index, record in enumerate(runs):
            panel = Panel(record, matrix, step_times=())
            draw_panel(panel, axes[0, column], axes[1, column], _COLOURS[index % len(_COLOURS)])
            starts.append(first_rise(panel))
        axes[1, column].set(ylabel=panel.label, xlim=(min(starts), end))
    axes[0, 0].set_ylabel("loss")
    lines = [Line2D([], [], color=_COLOURS[index % len(_COLOURS)], linewidth=2.2) for index in range(len(runs))]
    figure.legend(lines, list(records), loc="outside lower center", ncols=min(len(runs), 3), frameon=False)
    figure.suptitle(title)
    return figure


def own_matrices(record: SpectrumRecord) -> list[str]:
    """Return the matrices of the module's own embeddings; of what is watched, where there are none."""
    return [name for name in record.matrices if "." not in name] or record.matrices


def _check_time(record: SpectrumRecord) -> None:
    if len(record) < 2 or not (record.times.diff() > 0).all():
        raise UserError(
            "trajectories need at least two measurements and time that moves: the learning rate was 0 at some of them"
            if len(record) > 1
            else "trajectories need at least two measurements: train longer"
        )


def _steps_found(record: SpectrumRecord, matrix: str) -> str:
    try:
        count = record.detect_steps(matrix).num_distinct
    except ValueError:  # measured less than twice, since the run went on with other settings
        return ""
    # A matrix that starts high, as that of normalised embeddings does, shows modes and no steps.
    return f"{count} distinct step{'' if count == 1 else 's'}" if count else ""
