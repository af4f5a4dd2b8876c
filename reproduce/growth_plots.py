"""Plots of growing embeddings in their top three principal components, as panels and as an animation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from reproduce.plots import draw_extremes
from stepwise_lightning.plots.panels import (
    CLASS_COLOURS,
    TIME,
    Array,
    Figure,
    Panel,
    describe,
    draw_panel,
    legend_lines,
)

_MOMENT: dict[str, Any] = {"color": "tab:orange", "linewidth": 2, "alpha": 0.5}


def principal_components(embeddings: Array) -> Array:
    """Project embeddings (k, n, d) onto the top three principal components of the last, (k, n, 3).

    Each of the k sets is centred; components beyond d are zero.
    """
    centred = embeddings - embeddings.mean(1, keepdims=True)
    _, _, components = np.linalg.svd(centred[-1], full_matrices=False)
    shown = centred @ components[:3].T
    return np.pad(shown, ((0, 0), (0, 0), (0, 3 - shown.shape[2])))


def growth_figure(
    panel: Panel,
    embeddings: Array,
    samples: list[int],
    labels: Array,
    names: list[str],
    extremes: list[Array],
    title: str,
    note: str = "",
) -> Figure:
    """Draw embeddings at k measurements of a run, above its loss, its eigenvalues and images at the component ends.

    Args:
        panel: panel of the run, T measurements.
        embeddings: embeddings at these measurements, (k, n, d).
        samples: indices of the measurements.
        labels: class of each point, (n,), ≥ 0.
        names: names of the classes.
        extremes: for each of three components, images (2m, h, w, 3) in [0, 1], the m lowest before the m highest.
        title: title of the figure.
        note: text below the figure.

    """
    figure = Figure(figsize=(13.5, 7.4), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[1.15, 1], hspace=0.03)
    upper, lower = parts
    shown = principal_components(embeddings)
    for index, (points, sample) in enumerate(zip(shown, samples, strict=True)):
        axis: Any = upper.add_subplot(1, len(samples), index + 1, projection="3d")
        name = ("a point", "a line", "a plane", "a volume")[index] if index < 4 else f"{index} dimensions"
        _scatter(axis, points, labels, _limits(shown), f"{name}  (loss {panel.record.losses[sample]:.1f})")
    patches = [Patch(color=_colour(label), label=names[label]) for label in np.unique(labels)]
    upper.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize="small", frameon=False)
    left, right = lower.subfigures(1, 2, width_ratios=[1.5, 1])
    _draw_run(left, panel, samples)
    ends = ("crops at the low end", "crops at the high end")
    for mode, (axis, images) in enumerate(zip(right.subplots(3, 1), extremes, strict=True)):
        draw_extremes(axis, images, f"PC {mode + 1}", None if mode else ends)
    describe(figure, title, note)
    return figure


def _draw_run(figure: Any, panel: Panel, samples: list[int]) -> None:
    """Draw loss and eigenvalues, and mark the measurements ``samples``."""
    loss_axis, eigenvalue_axis = figure.subplots(1, 2)
    draw_panel(panel, loss_axis, eigenvalue_axis)
    loss_axis.set(title="", ylabel="loss")
    eigenvalue_axis.set_ylabel(panel.label)
    for axis in (loss_axis, eigenvalue_axis):
        for sample in samples:
            axis.axvline(panel.times[sample], **_MOMENT, zorder=0)
        axis.set_xlabel(TIME)
    lines = [Line2D([], [], label="embeddings above", **_MOMENT), *legend_lines([panel], "detected step")[1:]]
    loss_axis.legend(handles=lines, loc="lower left", fontsize="small")


def growth_animation(path: Path, panel: Panel, embeddings: Array, labels: Array, frames: list[int], title: str) -> None:
    """Write a GIF of the embeddings (T, n, d) at the measurements ``frames``, next to loss and eigenvalues."""
    shown = principal_components(embeddings[frames])
    limits = _limits(shown)
    figure = Figure(figsize=(9, 4.2), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    halves: Any = figure.subfigures(1, 2)
    left, right = halves
    space: Any = left.add_subplot(projection="3d")
    loss_axis, eigenvalue_axis = right.subplots(2, 1, sharex=True)
    draw_panel(panel, loss_axis, eigenvalue_axis)
    loss_axis.set(title="", ylabel="loss")
    eigenvalue_axis.set_ylabel(panel.label)
    lines = [axis.axvline(panel.times[-1], **_MOMENT) for axis in (loss_axis, eigenvalue_axis)]
    figure.suptitle(title)

    def draw(index: int) -> list[Any]:
        space.clear()
        space.view_init(azim=-60 + 0.7 * index)
        _scatter(space, shown[index], labels, limits, f"loss {panel.record.losses[frames[index]]:.1f}")
        for line in lines:
            line.set_xdata([panel.times[frames[index]]] * 2)
        return []

    FuncAnimation(figure, draw, frames=len(frames)).save(path, writer=PillowWriter(fps=10))


def _scatter(axis: Any, points: Array, labels: Array, limits: Array, title: str) -> None:
    axis.scatter(*points.T, c=[_colour(label) for label in labels], s=8, alpha=0.8, linewidths=0)
    axis.set(xlim=limits[0], ylim=limits[1], zlim=limits[2])
    axis.set(xticklabels=[], yticklabels=[], zticklabels=[])
    axis.set_title(title, y=0.98)
    axis.set_box_aspect(None, zoom=0.85)  # the last label would lie outside
    for side, name in ((axis.xaxis, "PC 1"), (axis.yaxis, "PC 2"), (axis.zaxis, "PC 3")):
        side.set_label_text(name)
        side.labelpad = -8.0  # tick labels are hidden


def _colour(label: int) -> str:
    return CLASS_COLOURS[int(label) % len(CLASS_COLOURS)] if label >= 0 else "0.5"


def _limits(shown: Array) -> Array:
    """Return the limits of each axis that contain all points, (3, 2)."""
    low, high = shown.min((0, 1)), shown.max((0, 1))
    margin = np.where(high > low, 0.03 * (high - low), 1.0)
    return np.stack([low - margin, high + margin], 1)
