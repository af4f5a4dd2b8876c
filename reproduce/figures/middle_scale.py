"""Stepwise learning of a ResNet-18 on CIFAR-10 with the standard augmentation, the largest experiment so far.

The size is between the small ResNet of the other figures and the paper's ResNet-50 on STL-10: ResNet-18, 32×32 images,
128 pairs per batch, 400 steps, bfloat16 on CPU cores (``configs/<loss>_cifar10_cpu.yaml``). The three losses are
trained from small initialisation; the control is Barlow Twins from ordinary initialisation. Learning rates were chosen
from the growth rates of the initial features before these runs. The figure takes hours and ``all`` does not include it;
its results are in ``reproduce/results/middle_scale``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from reproduce.claims import Claim, worst
from reproduce.figure import Outcome, PaperFigure
from reproduce.networks.runs import ROW_COLUMNS, SMALL_INITIALIZATION, Run, distinct_steps, trained_runs
from reproduce.networks.training import MIDDLE_PROFILE
from reproduce.networks.variants import LOSS_SETTINGS, VARIANT_TITLES
from reproduce.options import data_name
from stepwise_lightning.plots import Panel, trajectories_figure

PAPER = "Main experiment, at a smaller size than in the paper."
MIN_STEPS = {"barlow_twins": 3, "vicreg": 3, "simclr": 3}
CONTROL = ("barlow_twins", "ordinary")


def produce(options: argparse.Namespace, directory: Path) -> Outcome:
    """Train the three losses and the control for every seed, and count steps."""
    runs = trained_runs(options, [*SMALL_INITIALIZATION, CONTROL])
    figure = trajectories_figure(
        [_panel(run) for run in runs if run.seed == options.seeds[0]],
        title="ResNet-18 with the standard augmentation",
        note=f"{data_name(options.data)}, batches of 128 pairs, seed {options.seeds[0]}",
        log_eigenvalues=True,
        same_axes=False,
        steps_label="detected step",
    )
    rows = (row for run in runs for row in run.rows())
    return Outcome(figure, ROW_COLUMNS, rows, _claims(runs, options), [run.summary() for run in runs])


def _panel(run: Run) -> Panel:
    panel = run.panel()
    if run.variant != "small":
        panel.title += f"\n{VARIANT_TITLES[run.variant]}"
    return panel


def _claims(runs: list[Run], options: argparse.Namespace) -> list[Claim]:
    return [
        worst(
            f"{loss}_steps", f"{LOSS_SETTINGS[loss].title}: distinct steps", distinct_steps(runs, loss, "small"), ">=",
            least, options.seeds, "Barlow Twins from ordinary initialisation", distinct_steps(runs, *CONTROL),
        )
        for loss, least in MIN_STEPS.items()
    ]  # fmt: skip


FIGURE = PaperFigure("middle_scale", __doc__, PAPER, MIDDLE_PROFILE, produce)
