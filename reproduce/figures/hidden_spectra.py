"""The hidden representation grows in the same steps as the embedding (appendix of the paper).

Losses see the embedding alone. Beside its eigenvalues stand those of the representation before the projector, on the
same held-out pairs, from the same runs as ``three_losses``. It starts large, so that its eigenvalues do not rise by
many orders of magnitude; but as the embedding learns its k-th mode, the k-th eigenvalue of the hidden covariance rises
too, and those of modes that are not learned do not.

For Barlow Twins and VICReg it rises nearer to the time of its own step than to one common time of all steps. For SimCLR
it does not (on photographs, seeds 0, 1, 2: 0.70, 1.03 and 1.21 times as far off), and nothing is claimed of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import geometric_mean

import numpy as np

from reproduce.claims import average, worst
from reproduce.figure import Outcome, PaperFigure
from reproduce.networks.runs import ROW_COLUMNS, Run, trained_runs
from reproduce.networks.training import PROFILES
from reproduce.networks.variants import LOSS_SETTINGS
from reproduce.options import data_name
from stepwise_lightning.plots import Panel, eigenvalues_figure

PAPER = (
    "Appendix: eigenvalues of the ResNet's hidden representation beside those of the embedding; they grow in steps at "
    "the same times, though training never looks at them."
)
HIDDEN = "encoder.backbone.covariance"
SHOWN = 16  # hidden eigenvalues in the figure
LEAST_GROWTH = {"barlow_twins": 2.5, "vicreg": 4.0, "simclr": 1.6}
# Photographs and CIFAR-10: of one seed up to 1.2, of three in the mean 0.46 to 0.87, and in reverse order 1.5 or more.
MOST_TIME_FACTOR = 0.95
# In the few steps of the smoke profile hidden modes have hardly begun to grow, and no control is told from them.
LEAST_GROWTH_SMOKE = 1.1
TIMED = ("barlow_twins", "vicreg")  # losses whose hidden eigenvalues keep to the steps' times


def produce(options: argparse.Namespace, directory: Path) -> Outcome:
    """Train what is missing, and compare the growth of both spectra."""
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
    claims = []
    for loss, method in LOSS_SETTINGS.items():
        growth, unlearned, factors, reversed_factors = (
            [summary[key] for summary in summaries if summary["loss"] == loss]
            for key in ("relative_growth", "unlearned_growth", "time_factor", "reversed_time_factor")
        )
        sentence = f"{method.title}: growth of learned modes' hidden eigenvalues over that of others"
        if options.profile == "smoke" and loss not in TIMED:
            continue
        if options.profile == "smoke":
            claims.append(worst(f"{loss}_growth", sentence, growth, ">=", LEAST_GROWTH_SMOKE, options.seeds))
            continue
        control = ("modes that are not learned, over those after them", unlearned)
        claims.append(worst(f"{loss}_growth", sentence, growth, ">=", LEAST_GROWTH[loss], options.seeds, *control))
        if loss not in TIMED:
            continue
        sentence = f"{method.title}: factor between their times and the steps', over that of one common time (medians)"
        control = ("the steps in reverse order", reversed_factors)
        claims.append(
            average(
                f"{loss}_times", sentence, factors, "<=", MOST_TIME_FACTOR, options.seeds, *control, mean=geometric_mean
            )
        )
    rows = (row for run in runs for row in run.rows({"hidden_eigenvalue": run.record.eigenvalues(HIDDEN)[:, :SHOWN]}))
    return Outcome(figure, ROW_COLUMNS, rows, claims, summaries)


def _growth(run: Run) -> dict[str, float]:
    """Measure the hidden eigenvalues of the learned modes, from the second on: the first is large from the start.

    Growth is final over initial value, the geometric mean of modes, over the same of as many modes that are not
    learned. A mode's rise time is when it is, for good, above the geometric mean of both values.
    """
    learned, times = int(run.steps.num_learned[-1]), run.record.times.numpy()
    # No more of them: those beyond the number of samples are zero.
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
        none = float("inf")
        return dict(relative_growth=0.0, unlearned_growth=0.0, time_factor=none, reversed_time_factor=none)
    apart, apart_reversed, apart_common = (
        np.median(np.abs(np.subtract(rises, times))) for times in (expected, expected[::-1], np.median(expected))
    )
    return {
        "relative_growth": float(np.exp(growth[1:learned].mean() - others.mean())),
        "unlearned_growth": float(np.exp(others.mean() - after.mean())),
        "time_factor": float(np.exp(apart - apart_common)),
        "reversed_time_factor": float(np.exp(apart_reversed - apart_common)),
    }


FIGURE = PaperFigure("hidden_spectra", __doc__, PAPER, PROFILES, produce)
