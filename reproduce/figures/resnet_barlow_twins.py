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
from pathlib import Path
from typing import Any

import numpy as np

from reproduce.claims import worst
from reproduce.options import data_name
from reproduce.outputs import Outcome, PaperFigure
from reproduce.runs import ROW_COLUMNS, Run, trained_runs
from reproduce.training import PROFILES
from stepwise_lightning.plots import trajectories_figure
from stepwise_lightning.spectrum import detect_steps

PAPER = (
    "Fig. 1 C-D: loss and embedding eigenvalues of ResNet-50 trained with Barlow Twins on STL-10 from small "
    "initialisation; the loss falls in steps, and at each an eigenvalue rises."
)


def produce(options: argparse.Namespace, directory: Path) -> Outcome:
    """Train for every seed, and compare losses with plateaus and steps with the prediction."""
    runs = trained_runs(options, losses=("barlow_twins",))
    figure = trajectories_figure(
        [runs[0].panel(with_theory=True)],
        title="A ResNet learns one eigenmode at a time, too",
        note=f"ResNet on {data_name(options.data)}, seed {options.seeds[0]}; dashed: theory of the last layer at "
        "initialisation",
        steps_label="detected step",
    )
    summaries = [run.summary() | _measured(run) for run in runs]
    claims = [
        worst(name, sentence, [summary[key] for summary in summaries], relation, bound, options.seeds)
        for name, sentence, key, relation, bound in (
            ("steps", "distinct steps", "distinct_steps", ">=", runs[0].method.least_steps[options.profile]),
            ("plateaus", "distance of the loss on a plateau from d − learned modes, in modes, median of plateaus",
             "plateau_error", "<=", 0.5),
            ("step_times", "factor between measured and predicted step time, from the second mode on",
             "step_time_factor", "<=", 2.5),
        )
    ]  # fmt: skip
    rows = (row for run in runs for row in run.rows())
    return Outcome(figure, ROW_COLUMNS, rows, claims, summaries)


def _measured(run: Run) -> dict[str, Any]:
    """Compare the loss with its plateaus, and the steps with those that the same rule finds in the prediction."""
    times, steps, losses = run.record.times, run.steps, run.record.losses
    dim = run.eigenvalues().shape[1]
    plateaus = []
    for learned in range(int(steps.num_learned.max()) + 1):
        level = losses[(steps.num_learned == learned) & losses.isfinite()].numpy()
        if len(level) >= 3:  # the second half of the plateau: before it, the last mode still rises
            plateaus.append(float(np.median(level[len(level) // 2 :])) - (dim - learned))
    predicted = detect_steps(times, run.predicted().embedding_eigenvalues(times))
    ratios = (steps.step_times / predicted.step_times)[1:].numpy()
    ratios = ratios[np.isfinite(ratios)]
    return {
        "plateau_error": float(np.median(np.abs(plateaus))),
        "largest_plateau_error": max(map(abs, plateaus)),
        "step_time_factor": float(np.exp(np.abs(np.log(ratios)).max())) if len(ratios) else float("inf"),
    }


FIGURE = PaperFigure("resnet_barlow_twins", __doc__, PAPER, PROFILES, produce)
