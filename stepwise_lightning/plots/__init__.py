"""Figures of what was measured: functions of records that return a matplotlib Figure."""

from stepwise_lightning.plots.doses import Response, doses_figure
from stepwise_lightning.plots.embeddings import embedding_figure, growth_animation, growth_figure, principal_components
from stepwise_lightning.plots.panels import Panel, draw_panel, mode_colours
from stepwise_lightning.plots.rules import rules_figure
from stepwise_lightning.plots.runs import overlay_figure, run_figure
from stepwise_lightning.plots.trajectories import (
    alignment_figure,
    alignments_figure,
    eigenfunctions_figure,
    eigenvalues_figure,
    spectra_figure,
    trajectories_figure,
)

__all__ = [
    "Panel",
    "Response",
    "alignment_figure",
    "alignments_figure",
    "doses_figure",
    "draw_panel",
    "eigenfunctions_figure",
    "eigenvalues_figure",
    "embedding_figure",
    "growth_animation",
    "growth_figure",
    "mode_colours",
    "overlay_figure",
    "principal_components",
    "rules_figure",
    "run_figure",
    "spectra_figure",
    "trajectories_figure",
]
