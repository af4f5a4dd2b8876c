"""Pictures of one model that is trained by several rules, and of what else comes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import LogFormatterMathtext, LogLocator

from stepwise_lightning.plots.doses import Response, draw_response
from stepwise_lightning.plots.figures import Figure
from stepwise_lightning.plots.panels import CLASS_COLOURS, Array, Panel, describe, draw_panel


def rules_figure(
    panels: Sequence[Panel], steps: Response, alignments: Mapping[str, Array], others: Response, title: str, note: str
) -> Figure:
    """Draw eigenvalues against steps, a panel for each rule, above what came of the rules.

    Args:
        panels: whose records have steps for times; all are drawn over one range of steps, and up to 2.
        steps: until all modes are learned, by rule.
        alignments: (s,) in [0, 1] by name, a dot each; the broken line is at 0.99.
        others: what is drawn beside these.
        title: of the figure.
        note: below it.

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
