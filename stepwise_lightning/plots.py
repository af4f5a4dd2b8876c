"""Figures: functions of arrays that return a matplotlib Figure. Experiment is solid, theory dashed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass
class Trajectory:
    """One training run, with its prediction where there is one.

    times (T,), losses (T,), eigenvalues (T, d), theory_losses (T,), theory_eigenvalues (T, d), step_times (d,).
    """

    title: str
    times: Array
    losses: Array
    eigenvalues: Array
    theory_losses: Array | None = None
    theory_eigenvalues: Array | None = None
    step_times: Array | None = None


def trajectories_figure(
    runs: list[Trajectory],
    title: str,
    note: str = "",
    loss_label: str = "loss",
    eigenvalues_label: str = "eigenvalues of C",
    log_eigenvalues: bool = False,
) -> Figure:
    """Draw loss above eigenvalues against log time, one column per run (in the manner of the paper's Fig. 1 A-B).

    The first column is the main one and wider. Vertical dotted lines are the step times: predicted ones where there is
    a prediction, else detected ones.
    """
    figure = Figure(figsize=(5.2 + 3.4 * len(runs), 6.2), layout="constrained")
    widths = [1.7] + [1.0] * (len(runs) - 1)
    axes = figure.subplots(2, len(runs), sharex="col", sharey="row", squeeze=False, width_ratios=widths)
    for column, run in enumerate(runs):
        _draw_run(axes[0, column], axes[1, column], run)
    axes[0, 0].set_ylabel(loss_label)
    axes[1, 0].set_ylabel(eigenvalues_label)
    if log_eigenvalues:
        axes[1, 0].set_yscale("log", nonpositive="mask")
    for axis, letter in zip(axes.T.flat, "ABCDEFGH", strict=False):
        axis.set_title(letter, loc="left", fontweight="bold")
    predicted = any(run.theory_eigenvalues is not None for run in runs)
    Line = matplotlib.lines.Line2D
    handles = [Line([], [], color="0.35", linewidth=2.2, label="experiment")]
    if predicted:
        handles.append(Line([], [], color="black", linewidth=1.1, linestyle="--", label="theory"))
    kind = "predicted" if predicted else "detected"
    handles.append(Line([], [], color="0.35", linewidth=0.9, linestyle=":", label=f"{kind} step"))
    axes[0, 0].legend(handles=handles, loc="upper right", frameon=True, framealpha=0.9)
    figure.suptitle(title)
    if note:
        figure.supxlabel(note, fontsize="small", color="0.3")
    return figure


def mode_colours(count: int) -> list[tuple[float, float, float, float]]:
    """Return one colour per mode, dark for the first to light for the last."""
    return [tuple(colour) for colour in matplotlib.colormaps["viridis"](np.linspace(0, 0.9, count))]


def _draw_run(loss_axis: Axes, eigenvalue_axis: Axes, run: Trajectory) -> None:
    colours = mode_colours(run.eigenvalues.shape[1])
    shown = run.times > 0  # time 0 has no place on a logarithmic axis
    times = run.times[shown]
    loss_axis.plot(times, run.losses[shown], color="tab:red", linewidth=2.2)
    for values, colour in zip(run.eigenvalues[shown].T, colours, strict=True):
        eigenvalue_axis.plot(times, values, color=colour, linewidth=2.2)
    dashed: dict[str, Any] = {"color": "black", "linewidth": 1.1, "linestyle": "--"}
    if run.theory_losses is not None:
        loss_axis.plot(times, run.theory_losses[shown], **dashed)
    if run.theory_eigenvalues is not None:
        eigenvalue_axis.plot(times, run.theory_eigenvalues[shown], **dashed)
    for time, colour in zip(run.step_times if run.step_times is not None else (), colours, strict=False):
        if np.isfinite(time):
            for axis in (loss_axis, eigenvalue_axis):
                axis.axvline(time, color=colour, linewidth=0.9, linestyle=":", zorder=0)
    loss_axis.set_title(run.title)
    loss_axis.set_xscale("log")
    loss_axis.set_ylim(bottom=0)
    eigenvalue_axis.set_xlabel("time  (learning rate × step)")
    # Start where the first mode begins to rise: before that nothing is to be seen.
    top = run.eigenvalues[shown].max(1)
    visible = times[top > 0.01 * top.max()]
    eigenvalue_axis.set_xlim(0.5 * visible[0] if len(visible) else times[0], times[-1])
    for axis in (loss_axis, eigenvalue_axis):
        axis.spines[["top", "right"]].set_visible(False)
