"""Plots of the figures that compare tangent kernels."""

from __future__ import annotations

from typing import Any

import numpy as np

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


def tangent_kernels_figure(
    panels: list[Panel],
    alignments: list[dict[str, Array]],
    drifts: dict[str, dict[int, list[float]]],
    ratios: dict[str, Array],
    title: str,
    note: str = "",
) -> Figure:
    """Draw eigenvalues above alignments against log time, one column per network, and two panels about all networks.

    Args:
        panels: one per network.
        alignments: alignments (T,), NaN where undefined, by kernel, for each panel.
        drifts: relative changes of the kernel, one per seed, by width, by name of the network.
        ratios: predicted over measured step times, (s, d), by kernel.
        title: title of the figure.
        note: text below the figure.

    """
    figure = Figure(figsize=(4.2 * len(panels) + 4, 6.8), layout="constrained")
    axes = figure.subplots(2, len(panels) + 1, squeeze=False)
    for column, (panel, values) in enumerate(zip(panels, alignments, strict=True)):
        upper, lower = axes[:, column]
        draw_panel(panel, None, upper)
        upper.set(title=panel.title, xlabel="", ylabel="" if column else panel.label)
        for (name, alignment), style in zip(values.items(), _KERNEL_STYLES, strict=True):
            lower.plot(panel.times, alignment, label=name, **style)
        lower.set(xscale="log", xlim=upper.get_xlim(), ylim=(0.4, 1.01), xlabel=TIME)
        lower.spines[["top", "right"]].set_visible(False)
    axes[1, 0].set_ylabel("alignment with the closed form")
    axes[1, 0].legend(loc="lower right", fontsize="small", title="kernel", frameon=False)
    drift, steps = axes[:, -1]
    for (name, by_width), colour in zip(drifts.items(), (CLASS_COLOURS[0], CLASS_COLOURS[5]), strict=True):
        drift.loglog(list(by_width), [np.mean(values) for values in by_width.values()], color=colour, label=name)
        for width, drifts_of_seeds in by_width.items():
            drift.plot([width] * len(drifts_of_seeds), drifts_of_seeds, "o", color=colour, markersize=4, alpha=0.6)
    drift.set(xlabel="width", title="relative change of the kernel in training")
    drift.set_xticks(list(by_width), [str(width) for width in by_width], minor=False)
    drift.minorticks_off()
    for (name, of_modes), style in zip(ratios.items(), _KERNEL_STYLES, strict=False):
        steps.plot(range(1, of_modes.shape[1] + 1), of_modes.T, "o", color=style["color"], markersize=4)
        steps.plot([], [], "o", color=style["color"], label=f"{name} kernel, initial")
    steps.axhline(1, color="0.6", linewidth=1, zorder=0)
    steps.set(xlabel="mode", yscale="log", title="predicted / measured step time (lazy)")
    for axis in (drift, steps):
        axis.legend(frameon=False, fontsize="small")
        axis.spines[["top", "right"]].set_visible(False)
    describe(figure, title, note, legend_lines(panels, ""))
    return figure
