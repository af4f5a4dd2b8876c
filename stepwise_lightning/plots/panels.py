"""Figures, and panels: one matrix of a record, with its theory and steps, and the functions that draw it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as MatplotlibFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray
from torch import Tensor

from stepwise_lightning.spectrum.matrices import axis_label
from stepwise_lightning.spectrum.record import SpectrumRecord

Array = NDArray[np.float64]
TIME = "time  (learning rate × step)"
# The colours of Okabe and Ito, and two more, which colour-blind readers can distinguish.
CLASS_COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#999999", "#882255", "#F0E442",
)  # fmt: skip
# The same without yellow, for one colour per run.
RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHED: dict[str, Any] = {"color": "black", "linewidth": 1.1, "linestyle": "--"}
_DOTTED: dict[str, Any] = {"linewidth": 1.1, "linestyle": ":"}
_ONE_ROW_WIDTH = 6.0  # inches: wider figures have the legend in one row
_FORECAST: dict[str, Any] = {
    "color": "black", "marker": "v", "markersize": 6, "markerfacecolor": "white", "linestyle": "",
}  # fmt: skip


class Figure(MatplotlibFigure):
    """Matplotlib figure that notebooks display with or without pyplot."""

    def _repr_png_(self) -> bytes:
        content = BytesIO()
        self.savefig(content, format="png")
        return content.getvalue()


@dataclass
class Panel:
    """Drawing options for one matrix of a record.

    Args:
        record: of the run; its losses are drawn if there is an axis for them, and the times at which a forecast
            expects modes are marked at the upper edge.
        matrix: name of the matrix; None for the first one of the record.
        title: above the panel.
        theory: record of the same matrix, drawn dashed; None for the record's own prediction of C, if any.
        step_times: drawn dotted, one per mode, () for none; None for the steps that ``detect_steps`` finds.
        num_modes: number of eigenvalues to draw; None for all.

    """

    record: SpectrumRecord
    matrix: str | None = None
    title: str = ""
    theory: SpectrumRecord | None = None
    step_times: Tensor | Sequence[float] | None = None
    num_modes: int | None = None

    @property
    def name(self) -> str:
        """Name of the matrix."""
        return self.matrix or self.record.matrices[0]

    @property
    def label(self) -> str:
        """Label of the eigenvalue axis."""
        return axis_label(self.name)

    @property
    def expected_times(self) -> list[float]:
        """Times at which a forecast expects modes to be learned."""
        return self.record.expected_times.get(self.name, [])

    @cached_property
    def times(self) -> Array:
        """Times of the measurements, (T,)."""
        return self.record.times.numpy()

    @cached_property
    def eigenvalues(self) -> Array:
        """The drawn eigenvalues, (T, d)."""
        return self.record.eigenvalues(self.name)[:, : self.num_modes].numpy()

    def predicted(self) -> SpectrumRecord | None:
        """Return the theory to draw."""
        if self.theory is None and self.record.predicted is not None and self.name == "cross_correlation":
            return SpectrumRecord.of(self.record.times, self.record.predicted)
        return self.theory

    def marks(self) -> list[float]:
        """Return the step times to draw, NaN for modes without a step."""
        if self.step_times is not None:
            return [float(time) for time in self.step_times][: self.num_modes]
        try:
            return self.record.detect_steps(self.name).step_times[: self.num_modes].tolist()
        except ValueError:  # too few measurements, or values that are not finite
            return []


def mode_colours(count: int) -> list[tuple[float, float, float, float]]:
    """Return one colour per mode, purple to light green, light enough for black dashes on top."""
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, count))
    return [tuple(colour) for colour in colours + 0.4 * (1 - colours)]


def draw_panel(panel: Panel, loss_axis: Axes | None, eigenvalue_axis: Axes, run_colour: Any = None) -> None:
    """Draw loss (if it has an axis) and eigenvalues against log time, theory dashed, steps dotted.

    Each mode has its own colour, unless ``run_colour`` is given for all modes and the loss.
    """
    num_modes = panel.eigenvalues.shape[1]
    colours = mode_colours(num_modes) if run_colour is None else [run_colour] * num_modes
    axes = [axis for axis in (loss_axis, eigenvalue_axis) if axis is not None]
    shown = panel.times > 0  # a logarithmic axis has no time 0
    times = panel.times[shown]
    if loss_axis is not None:
        loss_axis.plot(times, panel.record.losses.numpy()[shown], color=run_colour or "tab:red", linewidth=2.2)
        loss_axis.set_title(panel.title)
    for values, colour in zip(panel.eigenvalues[shown].T, colours, strict=True):
        eigenvalue_axis.plot(times, values, color=colour, linewidth=2.6)
    _draw_theory(panel, loss_axis, eigenvalue_axis)
    for time, colour in zip(panel.marks(), colours, strict=False):
        if np.isfinite(time):
            for axis in axes:
                axis.axvline(time, color=colour, zorder=0, **_DOTTED)
    if expected := panel.expected_times:
        above = eigenvalue_axis.get_xaxis_transform()
        eigenvalue_axis.plot(expected, np.ones(len(expected)), transform=above, clip_on=False, **_FORECAST)
    eigenvalue_axis.set_xlabel(TIME)
    if loss_axis is not None:
        _limit_loss(loss_axis)
    for axis in axes:
        _log_time(axis, first_rise(panel), times[-1])


def _limit_loss(loss_axis: Axes) -> None:
    """Begin the axis of a loss, and those that share its scale, at 0, unless a loss is negative."""
    if min(axis.dataLim.y0 for axis in loss_axis.get_shared_y_axes().get_siblings(loss_axis)) < 0:
        loss_axis.autoscale(axis="y")
    else:
        loss_axis.set_ylim(bottom=0)


def _draw_theory(panel: Panel, loss_axis: Axes | None, eigenvalue_axis: Axes) -> None:
    if (theory := panel.predicted()) is None:
        return
    moved = (theory.times > 0).numpy()
    times = theory.times.numpy()[moved]
    eigenvalue_axis.plot(times, theory.eigenvalues(panel.name)[:, : panel.num_modes].numpy()[moved], **_DASHED)
    if loss_axis is not None:
        loss_axis.plot(times, theory.losses.numpy()[moved], **_DASHED)


def _log_time(axis: Axes, first: float, last: float) -> None:
    # Longer axes have fewer tick labels, which would overlap.
    ticks = [1.0, 2.0, 5.0] if last / first < 500 else [1.0, 3.0] if last / first < 5000 else [1.0]
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=ticks))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlim(first, last)
    axis.spines[["top", "right"]].set_visible(False)


def legend_lines(panels: Sequence[Panel], steps_label: str) -> list[Line2D]:
    """Return legend entries for the line styles in use: solid, dashed, dotted, and forecast marks."""
    lines = [Line2D([], [], color="0.35", linewidth=2.6, label="experiment")]
    if any(panel.predicted() is not None for panel in panels):
        lines.append(Line2D([], [], label="theory", **_DASHED))
    if any(np.isfinite(panel.marks()).any() for panel in panels):
        lines.append(Line2D([], [], color="0.35", label=steps_label, **_DOTTED))
    if any(panel.expected_times for panel in panels):
        lines.append(Line2D([], [], label="forecast, one mode ahead", **_FORECAST))
    return lines


def gap_line(panels: Sequence[Panel]) -> list[Line2D]:
    """Return the legend entry for gaps in lines on a logarithmic axis; empty if no eigenvalue is negative."""
    broken = any((panel.eigenvalues[panel.times > 0] < 0).any() for panel in panels)
    broken_line: dict[str, Any] = {"color": "0.35", "linewidth": 2.6, "linestyle": (0, (2.5, 2.5))}
    return [Line2D([], [], label="gap: eigenvalue below 0", **broken_line)] if broken else []


def describe(figure: Figure, title: str, note: str, lines: Sequence[Line2D] = ()) -> None:
    """Add a title above a figure, and below it a note and one legend for all panels."""
    figure.suptitle(title)
    if lines:  # the note is the title of the legend, otherwise both would overlap
        columns = len(lines) if figure.get_figwidth() > _ONE_ROW_WIDTH else 2
        placed: dict[str, Any] = {"loc": "outside lower center", "ncols": columns, "frameon": False}
        legend = figure.legend(handles=lines, fontsize="small", title=note or None, title_fontsize="small", **placed)
        legend.get_title().set_color("0.3")
    elif note:
        figure.supxlabel(note, fontsize="small", color="0.3")


def first_rise(panel: Panel) -> float:
    """Return half the time at which the largest eigenvalue reaches 1 % of its maximum: the start of the time axis."""
    moved = panel.times > 0
    times, top = panel.times[moved], np.nan_to_num(panel.eigenvalues[moved]).max(1, initial=0)  # may have no modes
    visible = times[top > 0.01 * top.max()]
    return float(0.5 * visible[0] if len(visible) else times[0])


def log_scale(axis: Axes, eigenvalues: Array) -> None:
    """Set a logarithmic scale of at most ten orders of magnitude below the largest of these eigenvalues."""
    if (eigenvalues > 0).any():  # a collapsed embedding has no positive eigenvalue
        axis.set_yscale("log", nonpositive="mask")
        bottom = eigenvalues[eigenvalues > 1e-10 * np.nanmax(eigenvalues)].min()  # smaller values are round-off
        top = axis.dataLim.y1  # including the theory
        margin = max((top / bottom) ** 0.05, 1.05)  # all values may be equal
        axis.set_ylim(bottom / margin, top * margin)
