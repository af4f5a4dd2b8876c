"""Where there is nothing to learn in common, or another loss or start, there is no staircase.

Barlow Twins is trained as in ``resnet_barlow_twins``, and in five ways that leave out what theory needs: second views
of other images, images of noise, no term that keeps dimensions apart, the published loss with its small weight and its
normalisation, and ordinary initialisation. Each must show fewer distinct steps than any run of the staircase; all are
compared over as many training steps as the shortest run has, 400 on CPUs.

The paper has no such figure: the controls are ours. Wrong pairs have no Γ, so that no mode grows. Noise has the small Γ
that overlapping crops of it share, whose first modes are all but equal. Without the off-diagonal term every dimension
learns the first mode. The published loss is blind to the scale of an embedding, so that all of them start at once.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from reproduce.claims import Claim, worst
from reproduce.methods import VARIANT_TITLES
from reproduce.options import data_name
from reproduce.outputs import Outcome, PaperFigure
from reproduce.runs import ROW_COLUMNS, Run, trained_runs
from reproduce.training import PROFILES
from stepwise_lightning.plots import Panel, eigenvalues_figure
from stepwise_lightning.spectrum import detect_steps

PAPER = "Not in the paper: controls of ours for its Fig. 1 C-D."
CONTROLS = ("wrong_pairs", "noise_images", "no_off_diagonal", "published_loss", "ordinary")


def produce(options: argparse.Namespace, directory: Path) -> Outcome:
    """Train the staircase and its controls for every seed, and count steps."""
    runs = trained_runs(options, [("barlow_twins", variant) for variant in ("small", *CONTROLS)])
    steps = min(int(run.record.steps[-1]) for run in runs)
    panels = [_panel(run, steps) for run in runs if run.seed == options.seeds[0]]
    figure = eigenvalues_figure(
        [panels[:3], panels[3:]],
        ["", ""],
        title="A staircase needs pairs, images, decorrelation and a small start",
        same_time=False,
        note=f"Barlow Twins, ResNet on {data_name(options.data)}, seed {options.seeds[0]}",
    )
    rows = (row for run in runs for row in run.rows())
    return Outcome(figure, ROW_COLUMNS, rows, _claims(runs, steps, options), [run.summary() for run in runs])


def _panel(run: Run, steps: int) -> Panel:
    panel = run.panel()
    panel.title = f"{VARIANT_TITLES[run.variant]}: {_num_distinct(run, steps)} distinct"
    return panel


def _num_distinct(run: Run, steps: int) -> int:
    """Count the distinct steps in the first so many training steps."""
    within = run.record.steps <= steps
    return detect_steps(run.record.times[within], run.eigenvalues()[within]).num_distinct


def _claims(runs: list[Run], steps: int, options: argparse.Namespace) -> list[Claim]:
    counts = {
        variant: [_num_distinct(run, steps) for run in runs if run.variant == variant]
        for variant in ("small", *CONTROLS)
    }
    claims = []
    for variant in CONTROLS:
        sentence = f"{VARIANT_TITLES[variant]}: distinct steps ({', '.join(map(str, counts[variant]))})"
        beside = ("the staircase", counts["small"])
        claims.append(worst(variant, sentence, counts[variant], "<=", 2, options.seeds, *beside))
    return claims


FIGURE = PaperFigure("negative_controls", __doc__, PAPER, PROFILES, produce)
