"""Barlow Twins, VICReg and SimCLR learn their embeddings one dimension at a time (main experiment of the paper).

Each loss trains a ResNet from small initialisation, once per seed. Steps are counted in the eigenvalues of C for Barlow
Twins, which drives them from 0 to 1, of the covariance for VICReg, and of the tangent covariance for SimCLR. SimCLR
depends on normalised embeddings only; in their plain covariance the first mode has two eigenvalues, because it is an
arc on the sphere. ``standard_init`` shows ordinary initialisation.

Controls, trained for as many steps: Barlow Twins and VICReg without the decorrelation term, where all dimensions learn
the first mode; SimCLR, which has no such term, on wrong pairs. From ordinary initialisation SimCLR's modes start too
large to have a step by definition.

The paper trains ResNet-50 on STL-10 with standard augmentations (``--profile full``) and does not state learning rates
and initial scales. For the values used here, and the small ResNet of the default profile, see
``configs/<loss>_photos.yaml``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from reproduce.claims import worst
from reproduce.figure import Outcome, PaperFigure
from reproduce.networks.runs import ROW_COLUMNS, distinct_steps, trained_runs
from reproduce.networks.training import PROFILES
from reproduce.networks.variants import LOSS_SETTINGS, VARIANT_TITLES
from reproduce.options import data_name
from stepwise_lightning.plots import trajectories_figure

PAPER = (
    "Main experiment: loss and embedding eigenvalues for the three losses, ResNet-50 on STL-10; every loss learns in "
    "steps, and at each step one eigenvalue rises."
)
NETWORKS = [(loss, variant) for loss, settings in LOSS_SETTINGS.items() for variant in ("small", settings.control)]


def produce(options: argparse.Namespace, directory: Path) -> Outcome:
    """Train each loss and its control for every seed, and count steps."""
    runs = trained_runs(options, NETWORKS)
    figure = trajectories_figure(
        [run.panel(with_forecast=True) for run in runs if run.seed == options.seeds[0] and run.variant == "small"],
        title="Three losses learn their embeddings one dimension at a time",
        note=f"ResNet on {data_name(options.data)}, seed {options.seeds[0]}; settings: configs/; dashed: forecast "
        "from initialisation (VICReg: first mode only)",
        log_eigenvalues=True,
        same_axes=False,
    )
    claims = []
    for loss, settings in LOSS_SETTINGS.items():
        counts, control = (distinct_steps(runs, loss, variant) for variant in ("small", settings.control))
        claims.append(
            worst(
                f"{loss}_steps", f"{settings.title}: distinct steps ({', '.join(map(str, counts))})", counts, ">=",
                settings.min_steps[options.profile], options.seeds, VARIANT_TITLES[settings.control], control,
            )
        )  # fmt: skip
    return Outcome(
        figure, ROW_COLUMNS, (row for run in runs for row in run.rows()), claims, [r.summary() for r in runs]
    )


FIGURE = PaperFigure("three_losses", __doc__, PAPER, PROFILES, produce, networks=NETWORKS)
