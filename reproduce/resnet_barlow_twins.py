"""A ResNet trained with Barlow Twins learns in steps, as the linear model does (Fig. 1 C-D of the paper).

The analytical loss trains a ResNet from small initialisation. Each eigenvalue of C that rises from 0 to 1 takes one off
the loss: on its plateaus the loss is d minus the number of learned modes. The dashed lines are the linear theory of the
last layer on the features at initialisation, which has no free parameter; it knows the order of the steps and about
when they come, not that the features move while the network learns.

The paper trains ResNet-50 on STL-10 with standard augmentations (``--profile full``); the learning rate and the scale
of the start are not stated there. Ours, and the small ResNet of the default: see ``configs/barlow_twins_photos.yaml``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reproduce.common import Claim, Outcome, data_name, run_figure, seeds_of
from reproduce.runs import ROW_COLUMNS, Run, trained_runs
from reproduce.three_losses import LEAST_STEPS
from reproduce.training import PROFILES
from stepwise_lightning.plots.trajectories import trajectories_figure
from stepwise_lightning.spectrum.measures import detect_steps

PAPER = (
    "Fig. 1 C-D: loss and embedding eigenvalues of ResNet-50 trained with Barlow Twins on STL-10 from small "
    "initialisation; the loss falls in steps, and at each an eigenvalue rises."
)


def main(arguments: list[str] | None = None) -> int:
    """Run the experiment; return 0 if every claim holds, 1 if one fails, 2 for bad input."""
    return run_figure("resnet_barlow_twins", __doc__, PAPER, PROFILES, produce, arguments)


def produce(options: argparse.Namespace, directory: Path) -> Outcome:
    """Train for every seed, and compare losses with plateaus and steps with the prediction."""
    runs = trained_runs(options, losses=("barlow_twins",))
    figure = trajectories_figure(
        [runs[0].trajectory(with_theory=True)],
        title="A ResNet learns one eigenmode at a time, too",
        note=f"ResNet on {data_name(options.data)}, seed {options.seeds[0]}; dashed: theory of the last layer at "
        "initialisation",
        steps_label="detected step",
    )
    summaries = [run.summary() | _measured(run) for run in runs]
    least = LEAST_STEPS[options.profile]["barlow_twins"]
    claims = [_claim("steps", "distinct steps; fewest", ">=", least, "distinct_steps", summaries, options)]
    what = "loss on a plateau less (d − learned modes), in modes, median of plateaus; farthest off"
    claims.append(_claim("plateaus", what, "<=", 0.5, "plateau_error", summaries, options))
    what = "measured over predicted step time, from the second mode on; farthest from 1, as a factor"
    claims.append(_claim("step_times", what, "<=", 2.5, "step_time_factor", summaries, options))
    rows = (row for run in runs for row in run.rows())
    return Outcome(figure, ROW_COLUMNS, rows, claims, summaries)


def _measured(run: Run) -> dict[str, Any]:
    """Compare the loss with its plateaus, and the steps with those that the same rule finds in the prediction."""
    times, found, losses = torch.from_numpy(run.spectra["time"]), run.found, run.spectra["loss"]
    dim = run.eigenvalues().shape[1]
    plateaus = []
    for learned in range(int(found.num_learned.max()) + 1):
        there = (found.num_learned == learned).numpy() & np.isfinite(losses)
        if there.sum() >= 3:  # the second half of the plateau: before it, the last mode still rises
            plateaus.append(float(np.median(losses[there][there.sum() // 2 :])) - (dim - learned))
    predicted = detect_steps(times, run.predicted().embedding_eigenvalues(times))
    ratios = (found.step_times / predicted.step_times)[1:].numpy()
    ratios = ratios[np.isfinite(ratios)]
    return {
        "plateau_error": float(np.median(np.abs(plateaus))),
        "largest_plateau_error": max(map(abs, plateaus)),
        "step_time_factor": float(np.exp(np.abs(np.log(ratios)).max())) if len(ratios) else float("inf"),
    }


def _claim(
    name: str, what: str, relation: str, bound: float, key: str, summaries: list[Any], options: argparse.Namespace
) -> Claim:
    values = [summary[key] for summary in summaries]
    worst = (max if relation == "<=" else min)(values)
    return Claim(name, f"{what}, {seeds_of(options)}", worst, relation, bound)


if __name__ == "__main__":
    sys.exit(main())
