"""Figure of runs over the reference bands of their configurations, and in units of the time of their first mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from stepwise_lightning.errors import UserError
from stepwise_lightning.plots.panels import RUN_COLOURS, Figure
from stepwise_lightning.spectrum import Comparison, ReferenceBand, Steps
from stepwise_lightning.spectrum.matrices import axis_label
from stepwise_lightning.spectrum.record import SpectrumRecord

_GREY = "0.85"


@dataclass
class ComparedRun:
    """One run of a comparison."""

    name: str  #: name in the legend
    record: SpectrumRecord
    matrix: str  #: name of the matrix; that of the band, if there is one
    band: ReferenceBand | None = None  #: reference band of the run's configuration

    @cached_property
    def steps(self) -> Steps:
        """Steps of the matrix, with the threshold of the band."""
        return self.record.detect_steps(self.matrix, self.band.threshold if self.band else None)

    @cached_property
    def comparison(self) -> Comparison | None:
        """Result of the comparison with the band."""
        return self.band.compare(self.record) if self.band else None

    @property
    def label(self) -> str:
        """Name in the legend, and whether the run is inside its band."""
        if self.comparison is None:
            return self.name
        return f"{self.name}: {'inside' if self.comparison.inside else 'outside from the cross'}"

    @property
    def verdict(self) -> str:
        """One line: inside the band, or where the run leaves it."""
        if self.band is None or self.comparison is None:
            return "no reference band"
        return f"{self.comparison.description} ({self.band.name}, {len(self.band.records)} seeds)"


def comparison_figure(runs: Sequence[ComparedRun], title: str = "") -> Figure:
    """Draw the number of learned modes against optimiser steps, and eigenvalues against time in units of mode 1.

    There is one column for each band and matrix. The grey area is the band of the number of learned modes, and a cross
    marks the step at which a run leaves it. Grey lines are the eigenvalues of the reference runs. Eigenvalues of a run
    whose first mode is not learned or starts large have no such unit of time and are not drawn.

    Raises:
        ValueError: no runs.

    """
    if not runs:
        raise UserError("no runs to draw")
    columns: dict[tuple[str, str], list[tuple[ComparedRun, str]]] = {}
    lines: list[Any] = []
    for index, run in enumerate(runs):
        colour = RUN_COLOURS[index % len(RUN_COLOURS)]
        columns.setdefault((run.band.name if run.band else "", run.matrix), []).append((run, colour))
        lines.append(Line2D([], [], color=colour, linewidth=2.2, label=_escaped(run.label)))
    if any(run.band for run in runs):
        lines.append(Patch(color=_GREY, label="band, reference runs"))
    figure = Figure(figsize=(2 + 5 * len(columns), 6.8), layout="constrained")
    axes = figure.subplots(2, len(columns), squeeze=False)
    for (upper, lower), ((name, matrix), members) in zip(axes.T, columns.items(), strict=True):
        _draw_band(members[0][0].band, upper, lower)
        for run, colour in members:
            _draw_run(run, colour, upper, lower)
        upper.set(title=_escaped(name), xlabel="optimiser step", ylabel="learned modes")
        upper.yaxis.get_major_locator().set_params(integer=True)
        lower.set(xlabel="time / time of mode 1", ylabel=axis_label(matrix))
        for axis in (upper, lower):
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter("{x:g}")
            axis.spines[["top", "right"]].set_visible(False)
    figure.legend(handles=lines, loc="outside lower center", ncols=1, frameon=False)
    figure.suptitle(title)
    return figure


def _draw_band(band: ReferenceBand | None, upper: Axes, lower: Axes) -> None:
    if band is None:
        return
    low, high = band.limits
    steps = band.records[0].steps.numpy()[1:]
    fewest, most = ((limits[:, None] <= steps).sum(0) for limits in (high, low))
    upper.fill_between(steps, fewest, most, step="post", color=_GREY, linewidth=0)
    for record in band.records:
        _draw_eigenvalues(ComparedRun("", record, band.matrix, band), lower, color=_GREY, linewidth=0.8, zorder=0)


def _draw_run(run: ComparedRun, colour: str, upper: Axes, lower: Axes) -> None:
    values = run.record.eigenvalues(run.matrix)
    known = values.isfinite().any(1) & (run.record.steps > 0)
    steps, counts = run.record.steps[known].numpy(), (values[known] > run.steps.threshold).sum(1).numpy()
    upper.step(steps, counts, where="post", color=colour, linewidth=2.2)
    if run.comparison and not run.comparison.inside:
        left = run.comparison.left_at
        upper.plot(left, np.interp(left, steps, counts), "x", color=colour, markersize=11, markeredgewidth=2.5)
    _draw_eigenvalues(run, lower, color=colour, linewidth=1.8)


def _draw_eigenvalues(run: ComparedRun, axis: Axes, **style: Any) -> None:
    time = float(run.steps.step_times[0])
    if np.isfinite(time):
        times = run.record.times.numpy() / time
        shown = times > 0.5
        axis.plot(times[shown], run.record.eigenvalues(run.matrix).numpy()[shown], **style)


def _escaped(text: str) -> str:
    return text.replace("$", r"\$")  # $ begins a formula
