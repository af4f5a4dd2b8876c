"""Pictures of a dose and what comes of it: the same experiment many times, with one setting changed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from matplotlib.ticker import LogFormatterMathtext, LogLocator

from stepwise_lightning.plots.figures import Figure
from stepwise_lightning.plots.panels import CLASS_COLOURS, Array, Panel, describe, draw_panel, legend_lines


@dataclass
class Response:
    """What came of k doses, in s repetitions.

    Args:
        doses: what was given, k names in order.
        curves: what came of it, (s, k) by name.
        label: of the vertical axis.
        title: above the panel.
        log: whether the vertical axis is logarithmic.
        bounds: below which a value of a curve of the same name is not, (s, k), NaN for none; drawn as open triangles.

    """

    doses: list[str]
    curves: dict[str, Array]
    label: str
    title: str = ""
    log: bool = False
    bounds: dict[str, Array] = field(default_factory=dict)


def doses_figure(rows: list[list[Panel]], responses: list[Response], title: str, note: str = "") -> Figure:
    """Draw eigenvalues against log time, a row of panels for each model and one panel a dose, above the responses.

    Each repetition is a dot, and lines join their means.
    """
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


def draw_response(axis: Any, response: Response) -> None:
    """Draw one: a dot for each repetition, and a line through their means."""
    places = range(len(response.doses))
    for (name, values), colour in zip(response.curves.items(), CLASS_COLOURS, strict=False):
        axis.plot(places, values.mean(0), color=colour, linewidth=2, label=name)
        for repetition in values:
            axis.plot(places, repetition, "o", color=colour, markersize=4, alpha=0.6)
        for bounds in response.bounds.get(name, ()):
            axis.plot(places, bounds, "^", color=colour, markersize=7, fillstyle="none")
    axis.set_xticks(places, response.doses)
    axis.set(title=response.title, ylabel=response.label)
    if response.log:
        axis.set_yscale("log")
    else:
        axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)
    if len(response.curves) > 1:
        axis.legend(frameon=False)
