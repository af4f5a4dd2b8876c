"""Pictures of embeddings that grow: top three principal components, as panels and as an animation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import Patch

from stepwise_lightning.plots.figures import Figure
from stepwise_lightning.plots.panels import Array, Panel, draw_panel


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

    The components are those of the last time, and every panel has the same scale, so that a point grows into a line, a
    plane and a volume. With fewer than three dimensions the missing ones are zero.

    embeddings (k, n, d), titles (k,), labels (n,) to colour the points by, or None.
    """
    shown = principal_components(embeddings)
    figure = Figure(figsize=(3.2 * len(shown), 3.6), layout="constrained")
    for index, points in enumerate(shown):
        axis: Any = figure.add_subplot(1, len(shown), index + 1, projection="3d")
        _scatter(axis, points, labels, _limit(shown), titles[index])
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
        _scatter(axis, points, labels, _limit(shown), f"{name}  (loss {panel.record.losses[sample]:.1f})")
    patches = [Patch(color=_colour(label), label=names[label]) for label in np.unique(labels)]
    upper.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize="small", frameon=False)
    left, right = lower.subfigures(1, 2, width_ratios=[1.5, 1])
    loss_axis, eigenvalue_axis = left.subplots(1, 2)
    draw_panel(panel, loss_axis, eigenvalue_axis)
    loss_axis.set(title="", ylabel="loss")
    eigenvalue_axis.set_ylabel(panel.label)
    for axis in (loss_axis, eigenvalue_axis):
        for sample in samples:
            axis.axvline(panel.times[sample], color="tab:orange", linewidth=2, alpha=0.5, zorder=0)
        axis.set_xlabel("time; orange: the moments above")
    for mode, (axis, images) in enumerate(zip(right.subplots(3, 1), extremes, strict=True)):
        half, gap = len(images) // 2, np.ones((images.shape[1], images.shape[2] // 2, 3))
        axis.imshow(np.concatenate([*images[:half], gap, *images[half:]], axis=1), interpolation="nearest")
        axis.set(xticks=[], yticks=[], ylabel=f"PC {mode + 1}")
        axis.spines[:].set_visible(False)
        if mode == 0:
            axis.set_title("crops at the low end" + 16 * " " + "at the high end", fontsize="small")
    figure.suptitle(title)
    if note:
        figure.supxlabel(note, fontsize="small", color="0.3")
    return figure


def growth_animation(path: Path, panel: Panel, embeddings: Array, labels: Array, frames: list[int], title: str) -> None:
    """Write a GIF of the embeddings, (T, n, d), at the measurements ``frames``, beside loss and eigenvalues."""
    shown = principal_components(embeddings[frames])
    limit = _limit(shown)
    figure = Figure(figsize=(9, 4.2), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    halves: Any = figure.subfigures(1, 2)
    left, right = halves
    space: Any = left.add_subplot(projection="3d")
    loss_axis, eigenvalue_axis = right.subplots(2, 1, sharex=True)
    draw_panel(panel, loss_axis, eigenvalue_axis)
    loss_axis.set(title="", ylabel="loss")
    eigenvalue_axis.set_ylabel(panel.label)
    lines = [axis.axvline(panel.times[-1], color="tab:orange", linewidth=2) for axis in (loss_axis, eigenvalue_axis)]
    figure.suptitle(title)

    def draw(index: int) -> list[Any]:
        space.clear()
        space.view_init(azim=-60 + 0.7 * index)
        _scatter(space, shown[index], labels, limit, f"loss {panel.record.losses[frames[index]]:.1f}")
        for line in lines:
            line.set_xdata([panel.times[frames[index]]] * 2)
        return []

    FuncAnimation(figure, draw, frames=len(frames)).save(path, writer=PillowWriter(fps=10))


def _scatter(axis: Any, points: Array, labels: Array | None, limit: float, title: str) -> None:
    colours: Any = "tab:blue" if labels is None else [_colour(label) for label in labels]
    axis.scatter(*points.T, c=colours, s=8, alpha=0.8, linewidths=0)
    axis.set(xlim=(-limit, limit), ylim=(-limit, limit), zlim=(-limit, limit), title=title)
    axis.set(xticklabels=[], yticklabels=[], zticklabels=[], xlabel="PC 1", ylabel="PC 2")
    axis.set_zlabel("PC 3")


def _colour(label: int) -> str:
    return f"C{int(label) % 10}" if label >= 0 else "0.5"


def _limit(shown: Array) -> float:
    """Leave out the farthest hundredth of points, or a few would shrink all others."""
    return float(np.quantile(np.abs(shown[-1]), 0.99)) or 1.0
