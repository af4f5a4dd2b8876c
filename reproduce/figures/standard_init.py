"""From ordinary initialisation the modes of Barlow Twins and SimCLR rise together, VICReg's do not (appendix).

The three losses are trained from small and from ordinary initialisation, once per seed; runs from ordinary
initialisation end earlier, when all modes have risen. The step detector excludes modes with large initial eigenvalues,
which are nearly all modes from ordinary initialisation. Here the time of a mode is the time at which it has covered
half of its range, from its lowest to its final value; its width is the time from a tenth to half. Two modes rise apart
if the time between them exceeds the width of the later one.

From small initialisation the modes of each loss rise apart. From ordinary initialisation the modes of Barlow Twins and
SimCLR do not. The modes of VICReg first decay, because the invariance term acts before the variance term, and then rise
apart, less clearly than from small initialisation. Barlow Twins from ordinary initialisation is its control there: same
network, seed and number of training steps, other loss. The control from small initialisation omits the covariance term.

The paper states that steps are hard to see in the loss from ordinary initialisation, without counts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from reproduce.claims import Claim, average
from reproduce.figure import Outcome, PaperFigure
from reproduce.networks.runs import ROW_COLUMNS, Run, trained_runs
from reproduce.networks.training import PROFILES
from reproduce.networks.variants import INITIALIZATIONS, LOSS_SETTINGS, VARIANT_TITLES
from reproduce.options import data_name
from stepwise_lightning.plots import Panel, eigenvalues_figure

PAPER = (
    "Appendix: the same three losses from ordinary initialisation; eigenvalues rise earlier and more nearly together, "
    "and the steps of the loss are hard to see."
)
# Means over three seeds on photographs and CIFAR-10: small initialisation 2.5 to 6.5; ordinary initialisation of VICReg
# 1.3 to 2.1 (0.94 to 2.8 for one seed), of Barlow Twins 0.59 to 0.88, of SimCLR 0.30 to 0.57. The four modes of the
# smoke profile are farther apart.
_MIN_SEPARATION = {"barlow_twins": 1.5, "vicreg": 1.0, "simclr": 1.0}
MIN_SEPARATION = {
    "smoke": {"barlow_twins": 2.0, "vicreg": 2.0, "simclr": 2.0}, "cpu": _MIN_SEPARATION, "full": _MIN_SEPARATION,
}  # fmt: skip
# Networks, and their controls whose modes must not rise apart.
CLAIMS = {
    ("barlow_twins", "small"): ("barlow_twins", "ordinary"),
    ("vicreg", "small"): ("vicreg", "no_covariance"),
    ("vicreg", "ordinary"): ("barlow_twins", "ordinary"),
    ("simclr", "small"): ("simclr", "ordinary"),
}
NETWORKS = [(loss, start) for start in INITIALIZATIONS for loss in LOSS_SETTINGS] + [("vicreg", "no_covariance")]


def produce(options: argparse.Namespace, directory: Path) -> Outcome:
    """Train from both initialisations for every loss and seed, and measure the separation of modes."""
    runs = trained_runs(options, NETWORKS)
    shown = [[r for r in runs if r.seed == options.seeds[0] and r.variant == start] for start in INITIALIZATIONS]
    figure = eigenvalues_figure(
        [[_panel(run) for run in row] for row in shown],
        [VARIANT_TITLES[start] for start in INITIALIZATIONS],
        title="From ordinary initialisation, modes rise together except with VICReg",
        same_time=False,
        note=f"ResNet on {data_name(options.data)}, seed {options.seeds[0]}",
        steps_label="mode at half of its range",
    )
    summaries = [run.summary() for run in runs]
    return Outcome(figure, ROW_COLUMNS, (row for run in runs for row in run.rows()), _claims(runs, options), summaries)


def _panel(run: Run) -> Panel:
    panel, rises = run.panel(), run.rises
    panel.title = f"{run.loss_settings.title}: {rises.num_apart} of {rises.num_modes} apart"
    panel.step_times = rises.times
    return panel


def _claims(runs: list[Run], options: argparse.Namespace) -> list[Claim]:
    separations = {
        kind: [run.rises.separation for run in runs if (run.loss, run.variant) == kind]
        for kind in {(run.loss, run.variant) for run in runs}
    }
    claims = []
    for (loss, start), control in CLAIMS.items():
        title = f"{LOSS_SETTINGS[loss].title}, {VARIANT_TITLES[start]}"
        sentence = f"{title}: time between modes over rise width, median over modes"
        claims.append(
            average(
                f"{loss}_{start}", sentence, separations[loss, start], ">=", MIN_SEPARATION[options.profile][loss],
                options.seeds, _control_title(loss, *control), separations[control],
            )
        )  # fmt: skip
    return claims


def _control_title(loss: str, control_loss: str, variant: str) -> str:
    other = "" if loss == control_loss else f"{LOSS_SETTINGS[control_loss].title}, "
    return other + VARIANT_TITLES[variant]


FIGURE = PaperFigure("standard_init", __doc__, PAPER, PROFILES, produce, networks=NETWORKS)
