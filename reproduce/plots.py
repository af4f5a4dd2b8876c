"""Plots of single paper figures; plots of general use are in :mod:`stepwise_lightning.plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatterMathtext, LogLocator

from stepwise_lightning.plots.panels import (
    CLASS_COLOURS,
    Array,
    Figure,
    Panel,
    describe,
    draw_panel,
    legend_lines,
)

# The first curve is the subject of the figure, the last ones are its controls.
_WORTH_STYLES: tuple[dict[str, Any], ...] = (
    {"color": CLASS_COLOURS[0], "linewidth": 2.6},
    {"color": CLASS_COLOURS[5], "linewidth": 2.0},
    {"color": "0.45", "linewidth": 1.6, "linestyle": "--"},
    {"color": CLASS_COLOURS[1], "linewidth": 1.6, "linestyle": "--"},
    {"color": CLASS_COLOURS[2], "linewidth": 1.6, "linestyle": ":"},
)


@dataclass
class Response:
    """Results of k conditions in s repetitions.

    Args:
        conditions: names of the conditions in order, (k,).
        curves: results (s, k) by name.
        label: label of the vertical axis.
        title: title of the panel.
        log: use a logarithmic vertical axis.
        bounds: lower bounds (s, k) by name of the curve, drawn as open triangles; NaN where there is no bound.

    """

    conditions: list[str]
    curves: dict[str, Array]
    label: str
    title: str = ""
    log: bool = False
    bounds: dict[str, Array] = field(default_factory=dict)


def draw_response(axis: Any, response: Response) -> None:
    """Draw one dot per repetition and a line through the means."""
    places = range(len(response.conditions))
    for (name, values), colour in zip(response.curves.items(), CLASS_COLOURS, strict=False):
        axis.plot(places, values.mean(0), color=colour, linewidth=2, label=name)
        for repetition in values:
            axis.plot(places, repetition, "o", color=colour, markersize=4, alpha=0.6)
        for bounds in response.bounds.get(name, ()):
            axis.plot(places, bounds, "^", color=colour, markersize=7, fillstyle="none")
    axis.set_xticks(places, response.conditions)
    axis.set(title=response.title, ylabel=response.label)
    if response.log:
        axis.set_yscale("log")
    else:
        axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)
    if len(response.curves) > 1:
        axis.legend(frameon=False)


def conditions_figure(rows: list[list[Panel]], responses: list[Response], title: str, note: str = "") -> Figure:
    """Draw eigenvalues against log time, one row per model and one panel per condition, above the responses."""
    figure = Figure(figsize=(1.2 + 2.2 * max(map(len, rows)), 3.6 + 2.4 * len(rows)), layout="constrained")
    parts: Any = figure.subfigures(len(rows) + 1, 1, height_ratios=[1.0] * len(rows) + [1.4])
    for part, panels in zip(parts, rows, strict=False):
        axes = part.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, panel in zip(axes, panels, strict=True):
            draw_panel(panel, None, axis)
            axis.set_title(panel.title, fontsize="medium")
            axis.set_xlabel("time")
            axis.xaxis.set_major_locator(LogLocator(numticks=4))
            axis.xaxis.set_major_formatter(LogFormatterMathtext())
        axes[0].set_ylabel(panels[0].label)
    for axis, response in zip(parts[-1].subplots(1, len(responses), squeeze=False)[0], responses, strict=True):
        draw_response(axis, response)
    describe(figure, title, note, legend_lines([panel for panels in rows for panel in panels], "step"))
    return figure


def rules_figure(
    panels: Sequence[Panel], steps: Response, alignments: Mapping[str, Array], others: Response, title: str, note: str
) -> Figure:
    """Draw eigenvalues against steps, one panel per training rule, above three comparisons of the rules.

    Args:
        panels: records whose times are optimiser steps; all panels share one range of steps, eigenvalues up to 2.
        steps: number of steps until all modes are learned, by rule.
        alignments: (s,) in [0, 1] by name, one dot each; a dashed line marks 0.99.
        others: a further response, in [0, 1].
        title: title of the figure.
        note: text below the figure.

    """
    figure = Figure(figsize=(1.2 + 2.6 * len(panels), 7.2), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[1.0, 1.5])
    upper = parts[0].subplots(1, len(panels), sharey=True, squeeze=False)[0]
    last = max(panel.times[-1] for panel in panels)
    for axis, panel in zip(upper, panels, strict=True):
        draw_panel(panel, None, axis)
        axis.set(title=panel.title, xlabel="steps", xlim=(1, last), ylim=(-0.05, 2))
        axis.xaxis.set_major_locator(LogLocator(numticks=6))
        axis.xaxis.set_major_formatter(LogFormatterMathtext())
    upper[0].set_ylabel(panels[0].label)
    left, middle, right = parts[1].subplots(1, 3, width_ratios=[1.15, 1, 1])
    draw_response(left, steps)
    left.set_title(steps.title, fontsize="medium")
    _draw_alignments(middle, alignments)
    draw_response(right, others)
    right.set_ylim(0, 1)
    right.set_xlabel("learned modes")
    right.set_title(others.title, fontsize="medium")
    describe(figure, title, note)
    return figure


def _draw_alignments(axis: Any, alignments: Mapping[str, Array]) -> None:
    for place, values in enumerate(alignments.values()):
        axis.plot(values, [place] * len(values), "o", color=CLASS_COLOURS[0], markersize=6, alpha=0.6)
    axis.axvline(0.99, color="0.5", linewidth=1, linestyle="--", zorder=0)
    axis.set_yticks(range(len(alignments)), alignments)
    axis.set(xlim=(0, 1.03), xlabel="alignment with the closed form", ylim=(len(alignments) - 0.5, -0.5))
    axis.set_title("linear model, all modes", fontsize="medium")
    axis.grid(axis="y", color="0.9")
    axis.spines[["top", "right"]].set_visible(False)


def alignments_figure(
    matrices: list[Array], titles: list[str], rows: list[str], columns: list[str], title: str, note: str = ""
) -> Figure:
    """Draw matrices (rows, columns) of alignments in [0, 1] as tables of coloured cells; NaN cells stay empty."""
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
    describe(figure, title, note)
    return figure


def eigenfunctions_figure(
    panels: list[Panel],
    extremes: list[list[Array]],
    title: str,
    note: str = "",
    steps_label: str = "predicted step",
) -> Figure:
    """Draw eigenvalues against log time, one column per run, above the images at both ends of its first eigenfunctions.

    extremes: for each panel and mode, images (2k, h, w, 3) in [0, 1], the k lowest before the k highest; panels may
        have different numbers of modes.
    """
    rows = max(map(len, extremes))
    figure = Figure(figsize=(6.2 * len(panels), 3.7 + 0.72 * rows), layout="constrained")
    axes = figure.subplots(1 + rows, len(panels), squeeze=False, height_ratios=[4.5] + [1.0] * rows)
    for column, (panel, images_of) in enumerate(zip(panels, extremes, strict=True)):
        draw_panel(panel, None, axes[0, column])
        axes[0, column].set_title(panel.title)
        for axis in axes[1 + len(images_of) :, column]:
            axis.set_axis_off()
        for mode, images in enumerate(images_of):
            draw_extremes(axes[1 + mode, column], images, str(mode + 1), ("lowest", "highest") if not mode else None)
    axes[0, 0].set_ylabel(panels[0].label)
    describe(figure, title, note, legend_lines(panels, steps_label))
    return figure


def draw_extremes(axis: Axes, images: Array, label: str, ends: tuple[str, str] | None = None) -> None:
    """Draw images (2k, h, w, 3) in [0, 1] in one row, the first k left of the last k, with ``ends`` as headings."""
    half, gap = len(images) // 2, images.shape[2] // 2
    blank = np.ones((images.shape[1], gap, 3))
    strip = np.concatenate([*images[:half], blank, *images[half:]], axis=1)
    axis.imshow(strip, interpolation="nearest")
    axis.set(xticks=[], yticks=[], ylabel=label)
    axis.spines[:].set_visible(False)
    centre = 0.5 * (strip.shape[1] - gap) / 2
    for name, place in zip(ends or (), (centre, strip.shape[1] - centre), strict=False):
        above = axis.get_xaxis_transform()
        axis.text(place, 1.08, name, transform=above, ha="center", va="bottom", fontsize="small")


@dataclass
class WorthPanel:
    """Accuracies of several representations in s repetitions.

    Args:
        curves: accuracies (s, k + 1) with 0 to k modes, NaN where a repetition has fewer modes; all panels of a figure
            have the same names.
        chance: accuracy of a guess.
        title: title of the panel.

    """

    curves: Mapping[str, Array]
    chance: float
    title: str = ""


def worth_figure(rows: list[list[WorthPanel]], labels: list[str], title: str, note: str = "") -> Figure:
    """Draw accuracy against the number of modes: rows of panels, named by labels; a column is one experiment.

    Each repetition is a dot; lines join the means at the numbers of modes that all repetitions have.
    """
    figure = Figure(figsize=(1.4 + 3.7 * len(rows[0]), 1.6 + 2.7 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(rows[0]), sharex=True, sharey=True, squeeze=False)
    names = list(rows[0][0].curves)
    for i, panels in enumerate(rows):
        for axis, panel in zip(axes[i], panels, strict=True):
            axis.axhline(panel.chance, color="0.8", linewidth=1.2, zorder=0)
            for name, style in zip(names, _WORTH_STYLES, strict=False):
                values = panel.curves[name]
                complete = np.isfinite(values).all(0)
                axis.plot(np.arange(values.shape[1])[complete], values[:, complete].mean(0), **style)
                for repetition in values:
                    axis.plot(repetition, "o", color=style["color"], markersize=2.6, alpha=0.5)
            axis.set_title(panel.title, fontsize="medium")
            axis.spines[["top", "right"]].set_visible(False)
        axes[i, 0].set_ylabel(labels[i])
    longest = max(values.shape[1] for panels in rows for panel in panels for values in panel.curves.values())
    for axis in axes[-1]:
        axis.set(xlabel="first k modes, or components", xticks=range(0, longest, 1 if longest < 13 else 5))
    lines = [Line2D([], [], label=name, **style) for name, style in zip(names, _WORTH_STYLES, strict=False)]
    describe(figure, title, note, [*lines, Line2D([], [], color="0.8", linewidth=1.2, label="chance")])
    return figure
