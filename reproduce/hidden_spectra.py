"""The hidden representation grows in the same steps as the embedding (appendix of the paper).

Losses see the embedding alone. Beside its eigenvalues stand those of the representation before the projector, on the
same held-out pairs, from the same runs as ``three_losses``. It starts large, so that its eigenvalues do not rise by
many orders of magnitude; but as the embedding learns its k-th mode, the k-th eigenvalue of the hidden covariance rises
too, and those of modes that are not learned do not.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from reproduce.common import Claim, Outcome, data_name, run_figure, seeds_of
from reproduce.runs import LOSSES, ROW_COLUMNS, TITLES, Run, trained_runs
from reproduce.training import PROFILES
from stepwise_lightning.plots.trajectories import Trajectory, eigenvalues_figure

PAPER = (
    "Appendix: eigenvalues of the ResNet's hidden representation beside those of the embedding; they grow in steps at "
    "the same times, though training never looks at them."
)
HIDDEN = "encoder.backbone"
SHOWN = 16  # hidden eigenvalues in the figure
# In the few steps of the smoke profile hidden modes have hardly begun to grow.
LEAST_GROWTH = {"smoke": 1.1, "cpu": 1.5, "full": 1.5}


def main(arguments: list[str] | None = None) -> int:
    """Run the experiment; return 0 if every claim holds, 1 if one fails, 2 for bad input."""
    return run_figure("hidden_spectra", __doc__, PAPER, PROFILES, produce, arguments)


def produce(options: argparse.Namespace, directory: Path) -> Outcome:
    """Train what is missing, and compare the growth of both spectra."""
    runs = trained_runs(options)
    first = [run for run in runs if run.seed == options.seeds[0]]
    figure = eigenvalues_figure(
        [[run.trajectory() for run in first], [_hidden(run) for run in first]],
        ["embedding", "hidden representation"],
        title="The hidden representation grows in the same steps as the embedding",
        note=f"ResNet on {data_name(options.data)}, seed {options.seeds[0]}; dotted: detected steps of the embedding",
    )
    summaries = [run.summary() | _growth(run) for run in runs]
    claims = []
    for loss in LOSSES:
        of = [summary for summary in summaries if summary["loss"] == loss]
        what = f"{TITLES[loss]}: growth of learned modes' hidden eigenvalues over that of others, {seeds_of(options)}"
        growth = min(s["relative_growth"] for s in of)
        claims.append(Claim(f"{loss}_growth", what, growth, ">=", LEAST_GROWTH[options.profile]))
        what = (
            f"{TITLES[loss]}: they rise within this factor of the steps' times (median of modes), {seeds_of(options)}"
        )
        claims.append(Claim(f"{loss}_times", what, max(s["time_factor"] for s in of), "<=", 2.0))
    rows = (row for run in runs for row in [*run.rows(), *_hidden_rows(run)])
    return Outcome(figure, ROW_COLUMNS, rows, claims, summaries)


def _growth(run: Run) -> dict[str, float]:
    """Measure the hidden eigenvalues of the learned modes, from the second on: the first is large from the start.

    Growth is final over initial value, the geometric mean of modes, over the same of as many modes that are not
    learned. A mode's rise time is when it is, for good, above the geometric mean of both values.
    """
    learned, times = int(run.found.num_learned[-1]), run.spectra["time"]
    # No more of them: those beyond the number of samples are zero.
    hidden = np.log(run.eigenvalues(HIDDEN)[:, : 2 * learned])
    start, end = hidden[0], np.median(hidden[-8:], axis=0)
    growth = end - start
    others = growth[learned : 2 * learned - 1]
    factors = []
    for mode in range(1, learned):
        below = np.nonzero(hidden[:, mode] < (start + end)[mode] / 2)[0]
        step = float(run.found.step_times[mode])
        if len(below) and np.isfinite(step):
            factors.append(abs(np.log(times[below[-1]] / step)))
    return {
        "relative_growth": float(np.exp(growth[1:learned].mean() - others.mean())) if learned > 1 else 0.0,
        "time_factor": float(np.exp(np.median(factors))) if factors else float("inf"),
    }


def _hidden(run: Run) -> Trajectory:
    return Trajectory(
        title="",
        times=run.spectra["time"],
        losses=run.spectra["loss"],
        eigenvalues=run.eigenvalues(HIDDEN)[:, :SHOWN],
        step_times=run.found.step_times.numpy(),
        eigenvalues_label="eigenvalues, covariance",
    )


def _hidden_rows(run: Run) -> list[list[Any]]:
    return [
        [run.loss, run.start, run.seed, step, time, "hidden_eigenvalue", mode, value]
        for step, time, values in zip(run.spectra["step"], run.spectra["time"], run.eigenvalues(HIDDEN), strict=True)
        for mode, value in enumerate(values[:SHOWN])
    ]


if __name__ == "__main__":
    sys.exit(main())
