"""Barlow Twins, VICReg and SimCLR learn their embeddings one dimension at a time (main experiment of the paper).

Each loss trains a ResNet from small initialisation, once per seed. Steps are counted in the eigenvalues of C for Barlow
Twins, which drives them from 0 to 1, of the covariance for VICReg, and of the covariance of normalised embeddings for
SimCLR, which sees no others. What remains of the steps from ordinary initialisation: ``standard_init``.

The paper trains ResNet-50 on STL-10 with standard augmentations (``--profile full``); learning rates and scales of the
start are not stated there. Ours, and the small ResNet of the default: see ``configs/<loss>_photos.yaml``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from reproduce.common import Claim, Outcome, data_name, run_figure, seeds_of
from reproduce.runs import LOSSES, ROW_COLUMNS, TITLES, Run, trained_runs
from reproduce.training import PROFILES
from stepwise_lightning.plots.trajectories import trajectories_figure

PAPER = (
    "Main experiment: loss above embedding eigenvalues for the three losses, ResNet-50 on STL-10; every loss learns in "
    "steps, one eigenvalue rising at each."
)
# How many distinct steps every seed must show; smoke has four dimensions.
LEAST_STEPS = {
    "smoke": {"barlow_twins": 3, "vicreg": 2, "simclr": 2},
    "cpu": {"barlow_twins": 6, "vicreg": 4, "simclr": 4},
    "full": {"barlow_twins": 6, "vicreg": 4, "simclr": 4},
}


def main(arguments: list[str] | None = None) -> int:
    """Run the experiment; return 0 if every claim holds, 1 if one fails, 2 for bad input."""
    return run_figure("three_losses", __doc__, PAPER, PROFILES, produce, arguments)


def produce(options: argparse.Namespace, directory: Path) -> Outcome:
    """Train each loss for every seed, and count steps."""
    runs = trained_runs(options)
    figure = trajectories_figure(
        [run.trajectory(with_theory=run.loss == "barlow_twins") for run in runs if run.seed == options.seeds[0]],
        title="Three losses learn their embeddings one dimension at a time",
        note=f"ResNet on {data_name(options.data)}, seed {options.seeds[0]}; settings: configs/; dashed, for Barlow "
        "Twins: theory of the last layer at initialisation",
        log_eigenvalues=True,
        same_axes=False,
    )
    claims = [_claim(loss, [run for run in runs if run.loss == loss], options) for loss in LOSSES]
    return Outcome(
        figure, ROW_COLUMNS, (row for run in runs for row in run.rows()), claims, [r.summary() for r in runs]
    )


def _claim(loss: str, runs: list[Run], options: argparse.Namespace) -> Claim:
    counts = [run.found.num_distinct for run in runs]
    what = f"{TITLES[loss]}: distinct steps, {', '.join(map(str, counts))} for {seeds_of(options)}; fewest"
    return Claim(f"{loss}_steps", what, min(counts), ">=", LEAST_STEPS[options.profile][loss])


if __name__ == "__main__":
    sys.exit(main())
