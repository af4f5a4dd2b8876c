"""Pictures of embeddings that grow: top three principal components, as panels and as an animation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from stepwise_lightning.plots.panels import (
    CLASS_COLOURS,
    TIME,
    Array,
    Panel,
    describe,
    draw_extremes,
    draw_panel,
    legend_lines,
)

_MOMENT: dict[str, Any] = {"color": "tab:orange", "linewidth": 2, "alpha": 0.5}


def principal_components(embeddings: Array) -> Array:
    """Return (k, n, d) embeddings in the top three principal components of the last, (k, n, 3).

    Each is centred; with fewer than three dimensions the missing ones are zero.
    """
    centred = embeddings - embeddings.mean(1, keepdims=True)
    _, _, components = np.linalg.svd(centred[-1], full_matrices=False)
    shown = centred @ components[:3].T
    return np.pad(shown, ((0, 0), (0, 0), (0, 3 - shown.shape[2])))


def embedding_figure(embeddings: Array, titles: list[str], labels: Array | None = None, title: str = "") -> Figure:
    """Draw the embeddings of one set of images at k times in their top three principal components, a panel per time.

    The components are those of the last time, and every panel has the same axes, so that a point grows into a line, a
    plane and a volume. With fewer than three dimensions the missing ones are zero.

    embeddings (k, n, d), titles (k,), labels (n,) to colour the points by, or None.
    """
    shown = principal_components(embeddings)
    figure = Figure(figsize=(3.2 * len(shown), 3.6), layout="constrained")
    for index, points in enumerate(shown):
        axis: Any = figure.add_subplot(1, len(shown), index + 1, projection="3d")
        _scatter(axis, points, labels, _limits(shown), titles[index])
    figure.suptitle(title)
    return figure


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
    """Draw embeddings at some samples of a run, above its loss, its eigenvalues and what lies at either end.

    Args:
        panel: of the run, T measurements.
        embeddings: at the samples, (k, n, d).
        samples: indices of these measurements.
        labels: of the points, (n,), ≥ 0, for colours.
        names: of the labels.
        extremes: for each of three components the images at its low and then at its high end, (2m, h, w, 3), in [0, 1].
        title: of the figure.
        note: below it.

    """
    figure = Figure(figsize=(13.5, 7.4), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=[1.15, 1], hspace=0.03)
    upper, lower = halves
    shown = principal_components(embeddings)
    for index, (points, sample) in enumerate(zip(shown, samples, strict=True)):
        axis: Any = upper.add_subplot(1, len(samples), index + 1, projection="3d")
        name = ("a point", "a line", "a plane", "a volume")[index] if index < 4 else f"{index} dimensions"
        _scatter(axis, points, labels, _limits(shown), f"{name}  (loss {panel.record.losses[sample]:.1f})")
    patches = [Patch(color=_colour(label), label=names[label]) for label in np.unique(labels)]
    upper.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize="small", frameon=False)
    left, right = lower.subfigures(1, 2, width_ratios=[1.5, 1])
    loss_axis, eigenvalue_axis = left.subplots(1, 2)
    draw_panel(panel, loss_axis, eigenvalue_axis)
    loss_axis.set(title="", ylabel="loss")
    eigenvalue_axis.set_ylabel(panel.label)
    for axis in (loss_axis, eigenvalue_axis):
        for sample in samples:
            axis.axvline(panel.times[sample], **_MOMENT, zorder=0)
        axis.set_xlabel(TIME)
    lines = [Line2D([], [], label="moments above", **_MOMENT), *legend_lines([panel], "detected step")[1:]]
    loss_axis.legend(handles=lines, loc="lower left", fontsize="small")
    ends = ("crops at the low end", "crops at the high end")
    for mode, (axis, images) in enumerate(zip(right.subplots(3, 1), extremes, strict=True)):
        draw_extremes(axis, images, f"PC {mode + 1}", None if mode else ends)
    describe(figure, title, note)
    return figure


def growth_animation(path: Path, panel: Panel, embeddings: Array, labels: Array, frames: list[int], title: str) -> None:
    """Write a GIF of the embeddings, (T, n, d), at the measurements ``frames``, beside loss and eigenvalues."""
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


def _scatter(axis: Any, points: Array, labels: Array | None, limits: Array, title: str) -> None:
    colours: Any = CLASS_COLOURS[0] if labels is None else [_colour(label) for label in labels]
    axis.scatter(*points.T, c=colours, s=8, alpha=0.8, linewidths=0)
    axis.set(xlim=limits[0], ylim=limits[1], zlim=limits[2])
    axis.set(xticklabels=[], yticklabels=[], zticklabels=[])
    axis.set_title(title, y=0.98)
    axis.set_box_aspect(None, zoom=0.85)  # or the last label lies outside
    for side, name in ((axis.xaxis, "PC 1"), (axis.yaxis, "PC 2"), (axis.zaxis, "PC 3")):
        side.set_label_text(name)
        side.labelpad = -8.0  # there are no ticks' labels


def _colour(label: int) -> str:
    return CLASS_COLOURS[int(label) % len(CLASS_COLOURS)] if label >= 0 else "0.5"


def _limits(shown: Array) -> Array:
    """Return from where to where each axis must reach for all points to lie inside, (3, 2)."""
    low, high = shown.min((0, 1)), shown.max((0, 1))
    margin = np.where(high > low, 0.03 * (high - low), 1.0)
    return np.stack([low - margin, high + margin], 1)
