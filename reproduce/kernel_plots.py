"""Plots of the figures that compare tangent kernels."""

from __future__ import annotations

from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

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

# Full kernel and last layer's kernel, at initialisation and after training.
_KERNEL_STYLES: tuple[dict[str, Any], ...] = tuple(
    {"color": CLASS_COLOURS[colour], "linewidth": 2.2, "linestyle": line} for line in ("-", ":") for colour in (0, 5)
)
_MACHINE_STYLES: tuple[dict[str, Any], ...] = (
    {"color": "black", "linewidth": 1.1, "linestyle": "--"},
    {"color": CLASS_COLOURS[5], "linewidth": 1.3, "linestyle": ":"},
)
_MOMENT_COLOURS = (CLASS_COLOURS[4], CLASS_COLOURS[0])


def tangent_kernels_figure(
    panels: list[Panel],
    machines: list[dict[str, Array]],
    alignments: list[dict[str, Array]],
    drifts: dict[str, dict[int, list[float]]],
    ratios: dict[str, Array],
    title: str,
    note: str = "",
) -> Figure:
    """Draw eigenvalues above alignments against log time, one column per network, and two panels about all networks.

    Args:
        panels: one per network.
        machines: eigenvalues of C (T, d) of kernel machines, by kernel, for each panel.
        alignments: alignments (T,), NaN where undefined, by kernel, for each panel.
        drifts: relative changes, one per seed, by width, by network and kernel.
        ratios: predicted over measured step times, (s, d), by kernel.
        title: title of the figure.
        note: text below the figure.

    """
    figure = Figure(figsize=(4.2 * len(panels) + 4, 6.8), layout="constrained")
    axes = figure.subplots(2, len(panels) + 1, squeeze=False)
    for column, (panel, predicted, values) in enumerate(zip(panels, machines, alignments, strict=True)):
        upper, lower = axes[:, column]
        draw_panel(panel, None, upper)
        for eigenvalues, style in zip(predicted.values(), _MACHINE_STYLES, strict=True):
            upper.plot(panel.times, eigenvalues, **style)
        upper.set(title=panel.title, xlabel="", ylabel="" if column else panel.label)
        for (name, alignment), style in zip(values.items(), _KERNEL_STYLES, strict=True):
            lower.plot(panel.times, alignment, label=name, **style)
        lower.set(xscale="log", xlim=upper.get_xlim(), ylim=(0.4, 1.01), xlabel=TIME)
        lower.spines[["top", "right"]].set_visible(False)
    axes[1, 0].set_ylabel("alignment with the closed form")
    axes[1, 0].legend(loc="lower right", fontsize="small", title="kernel", frameon=False)
    _draw_drifts(axes[0, -1], drifts)
    _draw_ratios(axes[1, -1], ratios)
    lines = [
        Line2D([], [], label=f"kernel machine, {name} kernel", **style)
        for name, style in zip(machines[0], _MACHINE_STYLES, strict=True)
    ]
    describe(figure, title, note, legend_lines(panels, "") + lines)
    return figure


def _draw_drifts(drift: Axes, drifts: dict[str, dict[int, list[float]]]) -> None:
    """Draw the relative changes of kernels against the width."""
    for (name, by_width), style in zip(drifts.items(), _KERNEL_STYLES, strict=True):
        drift.loglog(list(by_width), [np.mean(values) for values in by_width.values()], label=name, **style)
        for width, of_seeds in by_width.items():
            drift.plot([width] * len(of_seeds), of_seeds, "o", color=style["color"], markersize=4, alpha=0.6)
    drift.set(xlabel="width", title="relative change of a kernel in training")
    widths = next(iter(drifts.values()))
    drift.set_xticks(list(widths), [str(width) for width in widths])
    drift.minorticks_off()
    _finish(drift)


def _draw_ratios(steps: Axes, ratios: dict[str, Array]) -> None:
    """Draw predicted over measured step times of the modes."""
    for (name, of_modes), style in zip(ratios.items(), _KERNEL_STYLES, strict=False):
        steps.plot(range(1, of_modes.shape[1] + 1), of_modes.T, "o", color=style["color"], markersize=4)
        steps.plot([], [], "o", color=style["color"], label=f"{name} kernel, initial")
    steps.axhline(1, color="0.6", linewidth=1, zorder=0)
    steps.set(xlabel="mode", yscale="log", title="predicted / measured step time (lazy)")
    _finish(steps)


def _finish(axis: Axes) -> None:
    axis.legend(frameon=False, fontsize="small")
    axis.spines[["top", "right"]].set_visible(False)


def rivals_figure(
    alignments: dict[str, dict[str, dict[str, list[float]]]],
    correlations: dict[str, dict[str, list[float]]],
    moments: dict[str, str],
    title: str,
    note: str = "",
) -> Figure:
    """Draw the alignment with each rival, one row per rival and one panel per loss, and the correlation of views.

    Args:
        alignments: one value per seed, by loss, rival and moment; the first rivals are the best ones.
        correlations: one value per seed, by loss and moment.
        moments: labels of the moments of ``alignments``.
        title: title of the figure.
        note: text below the figure.

    """
    figure = Figure(figsize=(3.6 * len(alignments) + 4.6, 4.6), layout="constrained")
    panels: Any = figure.subplots(1, len(alignments) + 1, width_ratios=[1.0] * len(alignments) + [0.8])
    *axes, last = panels
    for axis, (loss, rivals) in zip(axes, alignments.items(), strict=True):
        for (moment, label), colour, shift in zip(moments.items(), _MOMENT_COLOURS, (-0.17, 0.17), strict=True):
            for place, values in enumerate(rivals[name][moment] for name in rivals):
                axis.barh(place + shift, np.mean(values) if values else 0, 0.32, color=colour, alpha=0.35)
                axis.plot(values, [place + shift] * len(values), "o", color=colour, markersize=3.5)
            axis.barh(0, 0, color=colour, alpha=0.6, label=label)
        axis.set_yticks(range(len(rivals)), rivals if axis is axes[0] else [""] * len(rivals))
        axis.set(xlim=(0, 1), ylim=(len(rivals) - 0.5, -0.5), title=loss, xlabel="alignment of the embeddings")
        axis.spines[["top", "right"]].set_visible(False)
    for (loss, by_moment), colour in zip(correlations.items(), CLASS_COLOURS, strict=False):
        places = [index for index, values in enumerate(by_moment.values()) if values]
        last.plot(places, [np.mean(values) for values in by_moment.values() if values], color=colour, label=loss)
        for place, values in enumerate(by_moment.values()):
            last.plot([place] * len(values), values, "o", color=colour, markersize=4)
    last.set_xticks(range(1 + len(moments)), ["start", *(fill(label, 12) for label in moments.values())])
    last.set(ylim=(0, 1), title="correlation of the features\nof two views")
    last.legend(frameon=False, fontsize="small")
    last.spines[["top", "right"]].set_visible(False)
    describe(figure, title, note, axes[0].get_legend_handles_labels()[0])
    return figure
