"""Figures of spectrum records: functions that return a matplotlib Figure."""

from stepwise_lightning.plots.comparison import ComparedRun, comparison_figure
from stepwise_lightning.plots.panels import Panel, draw_panel, mode_colours
from stepwise_lightning.plots.runs import overlay_figure, run_figure
from stepwise_lightning.plots.trajectories import eigenvalues_figure, spectra_figure, trajectories_figure

__all__ = [
    "ComparedRun",
    "Panel",
    "comparison_figure",
    "draw_panel",
    "eigenvalues_figure",
    "mode_colours",
    "overlay_figure",
    "run_figure",
    "spectra_figure",
    "trajectories_figure",
]
