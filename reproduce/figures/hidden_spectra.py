"""The hidden representation grows in the same steps as the embedding (appendix of the paper).

The losses depend on the embedding only. The figure compares its eigenvalues with the eigenvalues of the representation
before the projector, on the same held-out pairs, for the runs of ``three_losses``. The hidden eigenvalues are large at
initialisation and do not grow by many orders of magnitude. When the embedding learns its k-th mode, the k-th hidden
eigenvalue rises too; the hidden eigenvalues of other modes do not.

For Barlow Twins and VICReg each hidden eigenvalue rises closer to its own step than to a common time of all steps. For
SimCLR it does not (photographs, seeds 0, 1, 2: 0.70, 1.03 and 1.21 times the distance), and there is no claim.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import numpy as np

from reproduce.claims import Claim, average, worst
from reproduce.figure import Outcome, PaperFigure
from reproduce.networks.runs import ROW_COLUMNS, Run, trained_runs
from reproduce.networks.training import PROFILES
from reproduce.networks.variants import LOSS_SETTINGS
from reproduce.options import data_name
from stepwise_lightning.plots import Panel, eigenvalues_figure

PAPER = (
    "Appendix: eigenvalues of the ResNet's hidden representation grow in steps at the same times as the eigenvalues of "
    "the embedding, although the loss does not depend on them."
)
HIDDEN = "encoder.backbone.covariance"
SHOWN = 16  # hidden eigenvalues in the figure
MIN_GROWTH = {"barlow_twins": 2.5, "vicreg": 4.0, "simclr": 1.6}
# Measured on photographs and CIFAR-10: 0.46 to 0.87 as means over three seeds, up to 1.2 for one seed; 1.5 or more for
# the reversed order.
MAX_TIME_FACTOR = 0.95
# In the smoke profile the hidden modes have grown little, and a control cannot be distinguished.
MIN_GROWTH_SMOKE = 1.1
TIMED = ("barlow_twins", "vicreg")  # losses whose hidden eigenvalues rise at the times of the steps


def produce(options: argparse.Namespace, directory: Path) -> Outcome:
    """Train missing runs, and compare the growth of both spectra."""
    runs = trained_runs(options)
    first = [run for run in runs if run.seed == options.seeds[0]]
    figure = eigenvalues_figure(
        [
            [run.panel() for run in first],
            [Panel(run.record, HIDDEN, step_times=run.steps.step_times, num_modes=SHOWN) for run in first],
        ],
        ["embedding", "hidden representation"],
        title="The hidden representation grows in the same steps as the embedding",
        note=f"ResNet on {data_name(options.data)}, seed {options.seeds[0]}",
        steps_label="detected step of the embedding",
    )
    summaries = [run.summary() | _growth(run) for run in runs]
    rows = (row for run in runs for row in run.rows({"hidden_eigenvalue": run.record.eigenvalues(HIDDEN)[:, :SHOWN]}))
    return Outcome(figure, ROW_COLUMNS, rows, _claims(summaries, options), summaries)


def _claims(summaries: list[dict[str, Any]], options: argparse.Namespace) -> list[Claim]:
    claims, smoke, seeds = [], options.profile == "smoke", options.seeds
    for loss, settings in LOSS_SETTINGS.items():
        if smoke and loss not in TIMED:
            continue
        growth, unlearned, factors, reversed_factors = (
            [summary[key] for summary in summaries if summary["loss"] == loss]
            for key in ("relative_growth", "unlearned_growth", "time_factor", "reversed_time_factor")
        )
        sentence = f"{settings.title}: hidden growth of learned modes over hidden growth of other modes"
        least = MIN_GROWTH_SMOKE if smoke else MIN_GROWTH[loss]
        control = () if smoke else ("unlearned modes over the following modes", unlearned)
        claims.append(worst(f"{loss}_growth", sentence, growth, ">=", least, seeds, *control))
        if loss in TIMED and not smoke:
            sentence = f"{settings.title}: distance of hidden rises from the steps over distance from one common time"
            claims.append(
                average(
                    f"{loss}_times", sentence, factors, "<=", MAX_TIME_FACTOR, seeds, "steps in reverse order",
                    reversed_factors, geometric_mean,
                )
            )  # fmt: skip
    return claims


def _growth(run: Run) -> dict[str, float]:
    """Measure growth and rise times of the hidden eigenvalues of learned modes, without the first, which starts large.

    Growth is the final over the initial value, as a geometric mean over modes, relative to the same number of unlearned
    modes. The rise time is the last crossing of the geometric mean of both values.
    """
    learned, times = int(run.steps.num_learned[-1]), run.record.times.numpy()
    # Eigenvalues beyond the number of samples are zero.
    hidden = np.log(run.record.eigenvalues(HIDDEN)[:, : 3 * learned].numpy())
    start, end = hidden[0], np.median(hidden[-8:], axis=0)
    growth = end - start
    others, after = growth[learned : 2 * learned - 1], growth[2 * learned - 1 : 3 * learned - 2]
    rises, expected = [], []
    for mode in range(1, learned):
        below = np.nonzero(hidden[:, mode] < (start + end)[mode] / 2)[0]
        step = float(run.steps.step_times[mode])
        if len(below) and np.isfinite(step):
            rises.append(np.log(times[below[-1]]))
            expected.append(np.log(step))
    if not rises:
        infinite = float("inf")
        return dict(relative_growth=0.0, unlearned_growth=0.0, time_factor=infinite, reversed_time_factor=infinite)
    distance, reversed_distance, common_distance = (
        np.median(np.abs(np.subtract(rises, times))) for times in (expected, expected[::-1], np.median(expected))
    )
    return {
        "relative_growth": float(np.exp(growth[1:learned].mean() - others.mean())),
        "unlearned_growth": float(np.exp(others.mean() - after.mean())),
        "time_factor": float(np.exp(distance - common_distance)),
        "reversed_time_factor": float(np.exp(reversed_distance - common_distance)),
    }


FIGURE = PaperFigure("hidden_spectra", __doc__, PAPER, PROFILES, produce)
