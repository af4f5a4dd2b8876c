"""Plot of measured and predicted growth rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from stepwise_lightning.plots.panels import CLASS_COLOURS, Array, Figure, describe, mode_colours

_MARKERS = "osD^v<>P"


@dataclass
class RatePanel:
    """One model, trained with several losses in s repetitions.

    Args:
        title: name of the model.
        example: name of the loss whose growth is drawn.
        growth: its amplitudes relative to their initial values, (T + 1, k).
        predicted_growth: prediction of the same, (T + 1, k).
        rates: predicted and measured growth rates by loss, (s, 2, k).
        errors: largest relative error of a growth rate by loss, (s, rivals).

    """

    title: str
    example: str
    growth: Array
    predicted_growth: Array
    rates: dict[str, Array]
    errors: dict[str, Array]


def rates_figure(panels: list[RatePanel], rivals: Sequence[str], title: str, note: str = "") -> Figure:
    """Draw growth of an example, measured against predicted rates, and errors of rivals, one column per model."""
    figure = Figure(figsize=(12.5, 11), layout="constrained")
    axes = figure.subplots(3, len(panels), sharey="row", squeeze=False)
    for panel, (growth, rates, errors) in zip(panels, axes.T, strict=True):
        _draw_growth(growth, panel)
        _draw_rates(rates, panel)
        _draw_errors(errors, panel, rivals)
    axes[0, 0].set_ylabel("growth of mode 1, …, 5")
    axes[1, 0].set_ylabel("measured growth rate")
    axes[2, 0].set_ylabel("largest relative error of a growth rate")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    lines = [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=name)
        for name, colour, marker in zip(panels[0].rates, CLASS_COLOURS, _MARKERS, strict=False)
    ]
    describe(figure, title, note, lines)
    return figure


def _draw_growth(axis: Any, panel: RatePanel) -> None:
    for values, predicted, colour in zip(
        panel.growth.T, panel.predicted_growth.T, mode_colours(panel.growth.shape[1]), strict=True
    ):
        axis.semilogy(values, color=colour, linewidth=3.5)
        axis.semilogy(predicted, color="black", linewidth=1.1, linestyle="--")
    axis.set(title=f"{panel.title}: {panel.example}, dashed: predicted", xlabel="training step")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_rates(axis: Any, panel: RatePanel) -> None:
    values = np.concatenate([rates.ravel() for rates in panel.rates.values()])
    ends = np.array([values.min() / 1.5, values.max() * 1.5])
    axis.loglog(ends, ends, color="0.6", linewidth=1, zorder=0)
    for rates, colour, marker in zip(panel.rates.values(), CLASS_COLOURS, _MARKERS, strict=False):
        axis.loglog(*rates.swapaxes(0, 1).reshape(2, -1), marker, color=colour, markersize=5, alpha=0.7)
    axis.set(xlabel="predicted growth rate")


def _draw_errors(axis: Any, panel: RatePanel, rivals: Sequence[str]) -> None:
    for index, (errors, colour, marker) in enumerate(zip(panel.errors.values(), CLASS_COLOURS, _MARKERS, strict=False)):
        places = np.arange(len(rivals)) + 0.08 * (index - (len(panel.errors) - 1) / 2)
        for values in errors:
            axis.semilogy(places, values, marker, color=colour, markersize=4, alpha=0.7)
    axis.set_xticks(range(len(rivals)), [rival.replace(" ", "\n", 1) for rival in rivals])
    axis.set_xlim(-0.5, len(rivals) - 0.5)
