"""Pictures of what modes are worth: accuracy against the number of modes that a classifier sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.lines import Line2D

from stepwise_lightning.plots.figures import Figure
from stepwise_lightning.plots.panels import CLASS_COLOURS, Array, describe

# The first is what the figure is about; the last ones are what it has to be told from.
_STYLES: tuple[dict[str, Any], ...] = (
    {"color": CLASS_COLOURS[0], "linewidth": 2.6},
    {"color": CLASS_COLOURS[5], "linewidth": 2.0},
    {"color": "0.45", "linewidth": 1.6, "linestyle": "--"},
    {"color": CLASS_COLOURS[1], "linewidth": 1.6, "linestyle": "--"},
    {"color": CLASS_COLOURS[2], "linewidth": 1.6, "linestyle": ":"},
)


@dataclass
class WorthPanel:
    """What several representations are worth, in s repetitions.

    Args:
        curves: by name, the same names in all panels of a figure: accuracies (s, k + 1) with 0 to k modes, NaN where a
            repetition has not so many.
        chance: the accuracy that needs no representation.
        title: above the panel.

    """

    curves: Mapping[str, Array]
    chance: float
    title: str = ""


def worth_figure(rows: list[list[WorthPanel]], labels: list[str], title: str, note: str = "") -> Figure:
    """Draw accuracy against the number of modes: rows of panels, named by labels; a column is one experiment.

    Each repetition is a dot; lines join the means of those numbers of modes that all repetitions have.
    """
    figure = Figure(figsize=(1.4 + 3.7 * len(rows[0]), 1.6 + 2.7 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(rows[0]), sharex=True, sharey=True, squeeze=False)
    names = list(rows[0][0].curves)
    for i, panels in enumerate(rows):
        for axis, panel in zip(axes[i], panels, strict=True):
            axis.axhline(panel.chance, color="0.8", linewidth=1.2, zorder=0)
            for name, style in zip(names, _STYLES, strict=False):
                values = panel.curves[name]
                whole = np.isfinite(values).all(0)
                axis.plot(np.arange(values.shape[1])[whole], values[:, whole].mean(0), **style)
                for repetition in values:
                    axis.plot(repetition, "o", color=style["color"], markersize=2.6, alpha=0.5)
            axis.set_title(panel.title, fontsize="medium")
            axis.spines[["top", "right"]].set_visible(False)
        axes[i, 0].set_ylabel(labels[i])
    longest = max(values.shape[1] for panels in rows for panel in panels for values in panel.curves.values())
    for axis in axes[-1]:
        axis.set(xlabel="first k modes, or components", xticks=range(0, longest, 1 if longest < 13 else 5))
    lines = [Line2D([], [], label=name, **style) for name, style in zip(names, _STYLES, strict=False)]
    describe(figure, title, note, [*lines, Line2D([], [], color="0.8", linewidth=1.2, label="chance")])
    return figure
