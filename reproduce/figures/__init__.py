"""All figures, in the order of the paper; figures that share training runs are adjacent.

``LONG`` figures take much longer than the others and are run only by name.
"""

from collections.abc import Iterable

from reproduce.figure import PaperFigure
from reproduce.figures import (
    any_loss,
    conditions,
    cross_loss_alignment,
    embedding_growth,
    faster_modes,
    forecast,
    frozen_features,
    hidden_spectra,
    kernel_mlp,
    kernel_over_time,
    kernel_pca,
    linear_model,
    middle_scale,
    mode_worth,
    negative_controls,
    resnet_barlow_twins,
    stable_rates,
    standard_init,
    start_scale,
    three_losses,
)
from reproduce.networks.runs import trained_runs

FIGURES: dict[str, PaperFigure] = {
    module.FIGURE.name: module.FIGURE
    for module in (
        linear_model,
        start_scale,
        resnet_barlow_twins,
        frozen_features,
        negative_controls,
        three_losses,
        standard_init,
        hidden_spectra,
        cross_loss_alignment,
        kernel_over_time,
        embedding_growth,
        mode_worth,
        kernel_pca,
        kernel_mlp,
        faster_modes,
        any_loss,
        forecast,
        stable_rates,
        conditions,
        middle_scale,
    )
}
LONG = ("conditions", "middle_scale", "forecast", "stable_rates")


def train_networks(names: Iterable[str], arguments: list[str]) -> None:
    """Train the missing networks of several figures at once: no core waits for the last run of each figure.

    Raises the exceptions of :func:`reproduce.networks.runs.trained_runs`.
    """
    figures = [FIGURES[name] for name in names if FIGURES[name].networks]
    kinds = dict.fromkeys(kind for figure in figures for kind in figure.networks)
    if kinds:
        trained_runs(figures[0].options([*arguments, "--resume"]), kinds)
