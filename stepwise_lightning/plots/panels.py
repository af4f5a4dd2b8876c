"""One run in one place: which of its matrices, beside which theory, and how that is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray
from torch import Tensor

from stepwise_lightning.plots.figures import Figure
from stepwise_lightning.spectrum.matrices import axis_label
from stepwise_lightning.spectrum.record import SpectrumRecord

Array = NDArray[np.float64]
TIME = "time  (learning rate × step)"
# Okabe and Ito's, and two more, which colour-blind readers can tell apart too.
CLASS_COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#999999", "#882255", "#F0E442",
)  # fmt: skip
_DASHED: dict[str, Any] = {"color": "black", "linewidth": 1.1, "linestyle": "--"}
_DOTTED: dict[str, Any] = {"linewidth": 1.1, "linestyle": ":"}
_WIDE = 6.0  # inches: a figure that has room for a legend in one row
_DUE: dict[str, Any] = {"color": "black", "marker": "v", "markersize": 6, "markerfacecolor": "white", "linestyle": ""}


@dataclass
class Panel:
    """How to show one matrix of a record, which holds the numbers.

    Args:
        record: what was measured; its losses are drawn where there is an axis for them.
        matrix: the name of the matrix whose eigenvalues are drawn; None for the first one of the record.
        title: above the panel.
        theory: drawn dashed: a record of the same matrix, with its own times. None for the record's own prediction of C
            where it has one.
        step_times: drawn dotted, one a mode, () for none; None for those that ``detect_steps`` finds in the matrix.
        num_modes: how many of the eigenvalues to show; None for all.
        due: times at which modes were forecast to be learned, marked at the upper edge.

    """

    record: SpectrumRecord
    matrix: str | None = None
    title: str = ""
    theory: SpectrumRecord | None = None
    step_times: Tensor | Sequence[float] | None = None
    num_modes: int | None = None
    due: Sequence[float] = ()

    @property
    def name(self) -> str:
        """The matrix's."""
        return self.matrix or self.record.matrices[0]

    @property
    def label(self) -> str:
        """What the axis of its eigenvalues is called."""
        return axis_label(self.name)

    @cached_property
    def times(self) -> Array:
        """(T,)."""
        return self.record.times.numpy()

    @cached_property
    def eigenvalues(self) -> Array:
        """Those shown, (T, d)."""
        return self.record.eigenvalues(self.name)[:, : self.num_modes].numpy()

    def predicted(self) -> SpectrumRecord | None:
        """Return the theory to draw."""
        if self.theory is None and self.record.predicted is not None and self.name == "cross_correlation":
            return SpectrumRecord.of(self.record.times, self.record.predicted)
        return self.theory

    def marks(self) -> list[float]:
        """Return the finite step times; none where steps cannot be looked for."""
        if self.step_times is not None:
            return [float(time) for time in self.step_times][: self.num_modes]
        try:
            return self.record.detect_steps(self.name).step_times[: self.num_modes].tolist()
        except ValueError:  # too few measurements, or values that are not finite
            return []


def mode_colours(count: int) -> list[tuple[float, float, float, float]]:
    """Return one colour per mode, from purple to light green; each is light enough for black dashes to show on it."""
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, count))
    return [tuple(colour) for colour in colours + 0.4 * (1 - colours)]


def draw_panel(panel: Panel, loss_axis: Axes | None, eigenvalue_axis: Axes, colour_of_run: Any = None) -> None:
    """Draw loss (where there is an axis for it) and eigenvalues against log time, theory dashed, steps dotted.

    Each mode has a colour, or all and the loss that of the run.
    """
    num_modes = panel.eigenvalues.shape[1]
    colours = mode_colours(num_modes) if colour_of_run is None else [colour_of_run] * num_modes
    axes = [axis for axis in (loss_axis, eigenvalue_axis) if axis is not None]
    shown = panel.times > 0  # time 0 has no place on a logarithmic axis
    times, theory = panel.times[shown], panel.predicted()
    if loss_axis is not None:
        loss_axis.plot(times, panel.record.losses.numpy()[shown], color=colour_of_run or "tab:red", linewidth=2.2)
        loss_axis.set_title(panel.title)
    for values, colour in zip(panel.eigenvalues[shown].T, colours, strict=True):
        eigenvalue_axis.plot(times, values, color=colour, linewidth=2.6)
    if theory is not None:
        moved = (theory.times > 0).numpy()
        dashes = theory.times.numpy()[moved]
        eigenvalue_axis.plot(dashes, theory.eigenvalues(panel.name)[:, : panel.num_modes].numpy()[moved], **_DASHED)
        if loss_axis is not None:
            loss_axis.plot(dashes, theory.losses.numpy()[moved], **_DASHED)
    for time, colour in zip(panel.marks(), colours, strict=False):
        if np.isfinite(time):
            for axis in axes:
                axis.axvline(time, color=colour, zorder=0, **_DOTTED)
    if panel.due:
        above = eigenvalue_axis.get_xaxis_transform()
        eigenvalue_axis.plot(panel.due, np.ones(len(panel.due)), transform=above, clip_on=False, **_DUE)
    eigenvalue_axis.set_xlabel(TIME)
    if loss_axis is not None:
        loss_axis.set_ylim(bottom=0)
    first, last = first_rise(panel), times[-1]
    # More labels would run into each other.
    ticks = [1.0, 2.0, 5.0] if last / first < 500 else [1.0, 3.0] if last / first < 5000 else [1.0]
    for axis in axes:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=ticks))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlim(first, last)
        axis.spines[["top", "right"]].set_visible(False)


def legend_lines(panels: Sequence[Panel], steps_label: str) -> list[Line2D]:
    """Return what there is to explain in panels: solid, dashed and dotted lines, and gaps on logarithmic axes."""
    lines = [Line2D([], [], color="0.35", linewidth=2.6, label="experiment")]
    if any(panel.predicted() is not None for panel in panels):
        lines.append(Line2D([], [], label="theory", **_DASHED))
    if any(np.isfinite(panel.marks()).any() for panel in panels):
        lines.append(Line2D([], [], color="0.35", label=steps_label, **_DOTTED))
    if any(panel.due for panel in panels):
        lines.append(Line2D([], [], label="forecast, one mode ahead", **_DUE))
    return lines


def gap_line(panels: Sequence[Panel]) -> list[Line2D]:
    """Return what says, in a legend, why lines of eigenvalues are broken on logarithmic axes; nothing if none is."""
    broken = any((panel.eigenvalues[panel.times > 0] < 0).any() for panel in panels)
    broken_line: dict[str, Any] = {"color": "0.35", "linewidth": 2.6, "linestyle": (0, (2.5, 2.5))}
    return [Line2D([], [], label="gap: eigenvalue below 0", **broken_line)] if broken else []


def describe(figure: Figure, title: str, note: str, lines: Sequence[Line2D] = ()) -> None:
    """Put a title above a figure, and below it a note and one legend for all panels."""
    figure.suptitle(title)
    if lines:  # the note is the legend's title, or one would lie over the other
        columns = len(lines) if figure.get_figwidth() > _WIDE else 2
        placed: dict[str, Any] = {"loc": "outside lower center", "ncols": columns, "frameon": False}
        legend = figure.legend(handles=lines, fontsize="small", title=note or None, title_fontsize="small", **placed)
        legend.get_title().set_color("0.3")
    elif note:
        figure.supxlabel(note, fontsize="small", color="0.3")


def first_rise(panel: Panel) -> float:
    """Return half the time when the first mode begins to rise: before that nothing is to be seen."""
    moved = panel.times > 0
    times, top = panel.times[moved], np.nan_to_num(panel.eigenvalues[moved]).max(1, initial=0)  # there may be none
    visible = times[top > 0.01 * top.max()]
    return float(0.5 * visible[0] if len(visible) else times[0])


def log_scale(axis: Axes, eigenvalues: Array) -> None:
    """Give an axis of eigenvalues a logarithmic scale, ten orders of magnitude at the most, of what is above these."""
    if (eigenvalues > 0).any():  # a collapsed embedding has nothing that a logarithm could show
        axis.set_yscale("log", nonpositive="mask")
        bottom = eigenvalues[eigenvalues > 1e-10 * np.nanmax(eigenvalues)].min()  # below that is round-off
        top = axis.dataLim.y1  # of all that is drawn
        margin = (top / bottom) ** 0.05
        axis.set_ylim(bottom / margin, top * margin)
