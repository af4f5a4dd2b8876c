"""Figures: functions of arrays that return a matplotlib Figure. Experiment is solid, theory dashed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray

Array = NDArray[np.float64]
_TIME = "time  (learning rate × step)"


@dataclass
class Trajectory:
    """One training run, with its prediction where there is one.

    times (T,), losses (T,), eigenvalues (T, d), theory_losses (T,), theory_eigenvalues (T, d), step_times (d,).
    ``eigenvalues_label`` names the matrix, where runs beside each other differ in it.
    """

    title: str
    times: Array
    losses: Array
    eigenvalues: Array
    theory_losses: Array | None = None
    theory_eigenvalues: Array | None = None
    step_times: Array | None = None
    eigenvalues_label: str = ""


def trajectories_figure(
    runs: list[Trajectory],
    title: str,
    note: str = "",
    loss_label: str = "loss",
    eigenvalues_label: str = "eigenvalues of C",
    steps_label: str = "detected step",
    log_eigenvalues: bool = False,
    same_axes: bool = True,
) -> Figure:
    """Draw loss above eigenvalues against log time, one column per run (in the manner of the paper's Fig. 1 A-B).

    With ``same_axes`` the runs share their vertical axes, and the first is the main one and wider; without, they are
    different experiments of equal rank, such as different losses. Vertical dotted lines are the step times.
    """
    figure = Figure(figsize=(5.2 + 3.4 * len(runs), 6.2), layout="constrained")
    widths = [1.7 if same_axes else 1.0] + [1.0] * (len(runs) - 1)
    sharey: Any = "row" if same_axes else "none"
    axes = figure.subplots(2, len(runs), sharex="col", sharey=sharey, squeeze=False, width_ratios=widths)
    for column, run in enumerate(runs):
        draw_run(axes[0, column], axes[1, column], run)
        if log_eigenvalues:
            _log_scale(axes[1, column], run.eigenvalues)
        if not same_axes:
            axes[1, column].set_ylabel(run.eigenvalues_label)
    axes[0, 0].set_ylabel(loss_label)
    axes[1, 0].set_ylabel(runs[0].eigenvalues_label or eigenvalues_label)
    for axis, letter in zip(axes.T.flat, "ABCDEFGH", strict=False):
        axis.set_title(letter, loc="left", fontweight="bold")
    Line = matplotlib.lines.Line2D
    handles = [Line([], [], color="0.35", linewidth=2.2, label="experiment")]
    if any(run.theory_eigenvalues is not None for run in runs):
        handles.append(Line([], [], color="black", linewidth=1.1, linestyle="--", label="theory"))
    handles.append(Line([], [], color="0.35", linewidth=0.9, linestyle=":", label=steps_label))
    axes[0, 0].legend(handles=handles, loc="upper right", frameon=True, framealpha=0.9)
    figure.suptitle(title)
    if note:
        figure.supxlabel(note, fontsize="small", color="0.3")
    return figure


def eigenvalues_figure(rows: list[list[Trajectory]], labels: list[str], title: str, note: str = "") -> Figure:
    """Draw eigenvalues against log time, a panel per run: rows of runs, named by labels; a column is one experiment."""
    figure = Figure(figsize=(1.6 + 3.6 * len(rows[0]), 0.9 + 2.7 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(rows[0]), sharex="col", squeeze=False)
    for i, (runs, label) in enumerate(zip(rows, labels, strict=True)):
        for j, run in enumerate(runs):
            axis = axes[i, j]
            draw_run(None, axis, run)
            _log_scale(axis, run.eigenvalues)
            axis.set(title=run.title, ylabel=run.eigenvalues_label, xlabel=_TIME if i == len(rows) - 1 else "")
        axes[i, 0].set_ylabel(f"{label}\n{runs[0].eigenvalues_label}")
    for j, run in enumerate(rows[0]):  # where the first row's first mode begins to rise; hidden ones start large
        axes[0, j].set_xlim(_rise(run), run.times[-1])
    figure.suptitle(title)
    if note:
        figure.supxlabel(note, fontsize="small", color="0.3")
    return figure


def alignment_figure(runs: list[Trajectory], alignments: list[dict[str, Array]], title: str, note: str = "") -> Figure:
    """Draw eigenvalues above alignments, in [0, 1], against log time, one column per run.

    alignments: for each run, three of them by name, the baseline last: (T,), NaN where undefined.
    """
    figure = Figure(figsize=(6.2 * len(runs), 6.2), layout="constrained")
    axes = figure.subplots(2, len(runs), sharex="col", sharey="row", squeeze=False)
    for column, (run, values) in enumerate(zip(runs, alignments, strict=True)):
        upper, lower = axes[:, column]
        draw_run(None, upper, run)
        upper.set(title=run.title, xlabel="")
        for (name, alignment), colour in zip(values.items(), ("tab:blue", "tab:orange", "0.6"), strict=True):
            lower.plot(run.times, alignment, color=colour, linewidth=2.2, label=name)
        lower.set(ylim=(0, 1.03), xlabel=_TIME)
        lower.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("eigenvalues of C; dashed: theory")
    axes[1, 0].set_ylabel("alignment with the closed form")
    axes[1, 0].legend(loc="lower right")
    figure.suptitle(title)
    if note:
        figure.supxlabel(note, fontsize="small", color="0.3")
    return figure


def alignments_figure(
    matrices: list[Array], titles: list[str], rows: list[str], columns: list[str], title: str, note: str = ""
) -> Figure:
    """Draw matrices (rows, columns) of alignments in [0, 1] side by side, each number in its cell; NaN stays empty."""
    figure = Figure(figsize=(1.8 + 3.9 * len(matrices), 1.9 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots(1, len(matrices), sharey=True, squeeze=False)[0]
    for axis, matrix, name in zip(axes, matrices, titles, strict=True):
        image = axis.imshow(matrix, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for (i, j), value in np.ndenumerate(matrix):
            if np.isfinite(value):
                axis.text(j, i, f"{value:.2f}", ha="center", va="center", color="black" if value > 0.6 else "white")
        axis.set_xticks(range(len(columns)), columns, rotation=30, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(len(rows)), rows)
        axis.set_title(name)
    figure.colorbar(image, ax=axes, label="subspace alignment")
    figure.suptitle(title)
    if note:
        figure.supxlabel(note, fontsize="small", color="0.3")
    return figure


def eigenfunctions_figure(runs: list[Trajectory], extremes: list[list[Array]], title: str, note: str = "") -> Figure:
    """Draw eigenvalues against log time, one column per run, above the images at both ends of its first eigenfunctions.

    extremes: for each run and mode, images (2k, h, w, 3) in [0, 1], the k lowest before the k highest.
    """
    rows = len(extremes[0])
    figure = Figure(figsize=(6.2 * len(runs), 3.4 + 0.72 * rows), layout="constrained")
    axes = figure.subplots(1 + rows, len(runs), squeeze=False, height_ratios=[4.5] + [1.0] * rows)
    for column, (run, images_of) in enumerate(zip(runs, extremes, strict=True)):
        draw_run(None, axes[0, column], run)
        axes[0, column].set_title(run.title)
        for mode, images in enumerate(images_of):
            axis, half = axes[1 + mode, column], len(images) // 2
            gap = np.ones((images.shape[1], images.shape[2] // 2, 3))
            axis.imshow(np.concatenate([*images[:half], gap, *images[half:]], axis=1), interpolation="nearest")
            axis.set(xticks=[], yticks=[], ylabel=mode + 1)
            axis.spines[:].set_visible(False)
    axes[0, 0].set_ylabel("eigenvalues of C; dashed: theory")
    for axis in axes[1]:
        axis.set_title("lowest" + 48 * " " + "highest", fontsize="small")
    figure.suptitle(title)
    if note:
        figure.supxlabel(note, fontsize="small", color="0.3")
    return figure


def spectra_figure(times: Array, eigenvalues: Array, chosen: Array, title: str = "") -> Figure:
    """Draw the whole spectrum, eigenvalue against mode, at chosen times: each is drawn at the nearest sample.

    times (T,), eigenvalues (T, d) and descending, chosen (k,).
    """
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axis = figure.subplots()
    samples = np.abs(np.asarray(times)[:, None] - np.asarray(chosen)).argmin(0)
    modes = np.arange(1, eigenvalues.shape[1] + 1)
    for sample, colour in zip(samples, mode_colours(len(samples)), strict=True):
        axis.plot(modes, eigenvalues[sample], "o-", color=colour, markersize=4, label=f"{times[sample]:.3g}")
    axis.set(xlabel="mode", ylabel="eigenvalue", title=title)
    if (eigenvalues[samples] > 0).any():
        axis.set_yscale("log", nonpositive="mask")
    if len(modes) > 30:
        axis.set_xscale("log")
    else:
        axis.set_xticks(modes)
    axis.legend(title=_TIME, frameon=False, fontsize="small")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def mode_colours(count: int) -> list[tuple[float, float, float, float]]:
    """Return one colour per mode, dark for the first to light for the last."""
    return [tuple(colour) for colour in matplotlib.colormaps["viridis"](np.linspace(0, 0.9, count))]


def draw_run(loss_axis: Axes | None, eigenvalue_axis: Axes, run: Trajectory) -> None:
    """Draw loss (where there is an axis for it) and eigenvalues of a run against log time, theory dashed."""
    colours = mode_colours(run.eigenvalues.shape[1])
    axes = [axis for axis in (loss_axis, eigenvalue_axis) if axis is not None]
    shown = run.times > 0  # time 0 has no place on a logarithmic axis
    times = run.times[shown]
    dashed: dict[str, Any] = {"color": "black", "linewidth": 1.1, "linestyle": "--"}
    if loss_axis is not None:
        loss_axis.plot(times, run.losses[shown], color="tab:red", linewidth=2.2)
        if run.theory_losses is not None:
            loss_axis.plot(times, run.theory_losses[shown], **dashed)
        loss_axis.set_title(run.title)
    for values, colour in zip(run.eigenvalues[shown].T, colours, strict=True):
        eigenvalue_axis.plot(times, values, color=colour, linewidth=2.2)
    if run.theory_eigenvalues is not None:
        eigenvalue_axis.plot(times, run.theory_eigenvalues[shown], **dashed)
    for time, colour in zip(run.step_times if run.step_times is not None else (), colours, strict=False):
        if np.isfinite(time):
            for axis in axes:
                axis.axvline(time, color=colour, linewidth=0.9, linestyle=":", zorder=0)
    eigenvalue_axis.set_xlabel(_TIME)
    if loss_axis is not None:
        loss_axis.set_ylim(bottom=0)
    first, last = _rise(run), times[-1]
    # More labels would run into each other.
    ticks = [1.0, 2.0, 5.0] if last / first < 500 else [1.0, 3.0] if last / first < 5000 else [1.0]
    for axis in axes:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=ticks))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlim(first, last)
        axis.spines[["top", "right"]].set_visible(False)


def _rise(run: Trajectory) -> float:
    """Return half the time when the first mode begins to rise: before that nothing is to be seen."""
    times, top = run.times[run.times > 0], run.eigenvalues[run.times > 0].max(1, initial=0)  # there may be none
    visible = times[top > 0.01 * top.max()]
    return float(0.5 * visible[0] if len(visible) else times[0])


def _log_scale(axis: Axes, eigenvalues: Array) -> None:
    if (eigenvalues > 0).any():  # a collapsed embedding has nothing that a logarithm could show
        axis.set_yscale("log", nonpositive="mask")
        axis.set_ylim(bottom=max(axis.get_ylim()[0], 1e-10 * eigenvalues.max()))
