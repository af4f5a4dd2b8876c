"""Figures of eigenvalue trajectories and spectra, with theory dashed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from stepwise_lightning.plots.panels import (
    TIME,
    Figure,
    Panel,
    describe,
    draw_panel,
    first_rise,
    gap_line,
    legend_lines,
    log_scale,
    mode_colours,
)
from stepwise_lightning.spectrum.record import SpectrumRecord


def trajectories_figure(
    records: SpectrumRecord | Sequence[SpectrumRecord | Panel],
    title: str = "",
    note: str = "",
    loss_label: str = "loss",
    steps_label: str = "detected step",
    log_eigenvalues: bool = False,
    same_axes: bool = True,
) -> Figure:
    """Draw loss above eigenvalues against log time, one column per run (as in the paper's Fig. 1 A-B).

    Args:
        records: one record, or a sequence of records and panels; a panel selects the matrix and its theory.
        title: of the figure.
        note: below the figure.
        loss_label: label of the upper axis.
        steps_label: legend entry of the vertical dotted lines, which are step times.
        log_eigenvalues: use a logarithmic scale for eigenvalues.
        same_axes: share the vertical axes and draw the first run wider; False for different experiments, such as
            different losses.

    """
    panels = [Panel(records)] if isinstance(records, SpectrumRecord) else [_panel(item) for item in records]
    figure = Figure(figsize=(5.2 + 3.4 * len(panels), 6.2), layout="constrained")
    widths = [1.7 if same_axes else 1.0] + [1.0] * (len(panels) - 1)
    sharey: Any = "row" if same_axes else "none"
    axes = figure.subplots(2, len(panels), sharex="col", sharey=sharey, squeeze=False, width_ratios=widths)
    for column, panel in enumerate(panels):
        draw_panel(panel, axes[0, column], axes[1, column])
        if log_eigenvalues:
            log_scale(axes[1, column], panel.eigenvalues)
        if not same_axes or column == 0:
            axes[1, column].set_ylabel(panel.label)
    axes[0, 0].set_ylabel(loss_label)
    for axis, letter in zip(axes.T.flat, "ABCDEFGH", strict=False):
        axis.set_title(letter, loc="left", fontweight="bold")
    lines = legend_lines(panels, steps_label) + (gap_line(panels) if log_eigenvalues else [])
    axes[0, 0].legend(handles=lines, loc="best", frameon=True, framealpha=0.9)
    describe(figure, title, note)
    return figure


def _panel(item: SpectrumRecord | Panel) -> Panel:
    return Panel(item) if isinstance(item, SpectrumRecord) else item


def eigenvalues_figure(
    rows: list[list[Panel]],
    labels: list[str],
    title: str,
    note: str = "",
    steps_label: str = "detected step",
    same_time: bool = True,
) -> Figure:
    """Draw eigenvalues against log time in rows of panels, named by labels.

    With ``same_time`` the panels of a column share their time axis; without, each panel has its own.
    """
    figure = Figure(figsize=(1.6 + 3.6 * len(rows[0]), 1.2 + 2.7 * len(rows)), layout="constrained")
    sharex: Any = "col" if same_time else "none"
    axes = figure.subplots(len(rows), len(rows[0]), sharex=sharex, squeeze=False)
    for i, (panels, label) in enumerate(zip(rows, labels, strict=True)):
        for j, panel in enumerate(panels):
            axis = axes[i, j]
            draw_panel(panel, None, axis)
            log_scale(axis, panel.eigenvalues)
            axis.set(title=panel.title, ylabel=panel.label, xlabel=TIME if i == len(rows) - 1 else "")
        axes[i, 0].set_ylabel(f"{label}\n{panels[0].label}" if label else panels[0].label)
        for axis in axes[i, len(panels) :]:
            axis.set_axis_off()
    if same_time:
        for j, panel in enumerate(rows[0]):  # the first row sets the range: hidden representations start large
            axes[0, j].set_xlim(first_rise(panel), panel.times[-1])
    panels = [panel for row in rows for panel in row]
    describe(figure, title, note, legend_lines(panels, steps_label) + gap_line(panels))
    return figure


def spectra_figure(record: SpectrumRecord | Panel, chosen: Sequence[float] | Tensor, title: str = "") -> Figure:
    """Draw eigenvalue against mode at the measurements nearest to the chosen times, (k,)."""
    panel = _panel(record)
    times, eigenvalues = panel.times, panel.eigenvalues
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axis: Any = figure.subplots()
    samples = np.abs(times[:, None] - np.asarray(chosen)).argmin(0)
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
    axis.legend(title=TIME, frameon=False, fontsize="small")
    axis.spines[["top", "right"]].set_visible(False)
    return figure
