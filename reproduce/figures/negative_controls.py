"""Where there is nothing to learn in common, or another loss or start, there is no staircase.

Barlow Twins is trained as in ``resnet_barlow_twins``, and in five ways that leave out what theory needs: second views
of other images, images of noise, no term that keeps dimensions apart, the published loss with its small weight and its
normalisation, and ordinary initialisation. All are compared over as many training steps as the shortest run has, 450
on CPUs. Four must show fewer distinct steps than any run of the staircase. The published loss showed up to three in
600 steps, which a count does not tell from a short staircase; but its first mode does not wait: it must be learned in
three hundredths of this time.

The paper has no such figure: the controls are ours. Wrong pairs have no Γ, so that no mode grows. Noise has the small Γ
that overlapping crops of it share, whose first modes are all but equal. Without the off-diagonal term every dimension
learns the first mode. The published loss is blind to the scale of an embedding: there is no plateau before its first
mode, however small the start.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from reproduce.claims import Claim, worst
from reproduce.figure import Outcome, PaperFigure
from reproduce.networks.runs import ROW_COLUMNS, Run, trained_runs
from reproduce.networks.training import PROFILES
from reproduce.networks.variants import VARIANT_TITLES
from reproduce.options import data_name
from stepwise_lightning import SpectrumRecord
from stepwise_lightning.plots import Panel, eigenvalues_figure
from stepwise_lightning.spectrum import Steps, detect_steps

PAPER = "Not in the paper: controls of ours for its Fig. 1 C-D."
WITHOUT_STEPS = ("wrong_pairs", "noise_images", "no_off_diagonal", "ordinary")
CONTROLS = (*WITHOUT_STEPS, "published_loss")
MOST_STEPS = 2
MOST_WAIT = 0.03  # until the first mode is learned, as a share of the training steps


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
        note=f"Barlow Twins, ResNet on {data_name(options.data)}, seed {options.seeds[0]}, {steps} steps",
    )
    rows = (row for run in runs for row in run.rows())
    return Outcome(figure, ROW_COLUMNS, rows, _claims(runs, steps, options), [run.summary() for run in runs])


def _panel(run: Run, steps: int) -> Panel:
    """Return what is compared: the first so many training steps."""
    within = run.record.steps <= steps
    record = SpectrumRecord.of(run.record.times[within], run.eigenvalues()[within], matrix=run.loss_settings.matrix)
    found = _steps(run, steps)
    title = f"{VARIANT_TITLES[run.variant]}: {found.num_distinct} distinct"
    return Panel(record, run.loss_settings.matrix, title, step_times=found.step_times)


def _steps(run: Run, steps: int) -> Steps:
    """Return the steps in the first so many training steps."""
    within = run.record.steps <= steps
    return detect_steps(run.record.times[within], run.eigenvalues()[within])


def _wait(run: Run, steps: int) -> float:
    """Return the share of so many training steps until the first mode is learned; 1 if none is."""
    times = _steps(run, steps).step_times.nan_to_num(nan=math.inf, posinf=math.inf)
    return min(float(times.min() / run.record.times[run.record.steps <= steps][-1]), 1.0)


def _claims(runs: list[Run], steps: int, options: argparse.Namespace) -> list[Claim]:
    by_variant = {variant: [run for run in runs if run.variant == variant] for variant in ("small", *CONTROLS)}
    counts = {variant: [_steps(run, steps).num_distinct for run in own] for variant, own in by_variant.items()}
    claims = []
    for variant in WITHOUT_STEPS:
        sentence = f"{VARIANT_TITLES[variant]}: distinct steps ({', '.join(map(str, counts[variant]))})"
        beside = ("the staircase", counts["small"])
        claims.append(worst(variant, sentence, counts[variant], "<=", MOST_STEPS, options.seeds, *beside))
    sentence = "the published loss: share of the steps until the first mode is learned"
    waits, of_staircase = ([_wait(run, steps) for run in by_variant[name]] for name in ("published_loss", "small"))
    waiting = worst(
        "published_loss", sentence, waits, "<=", MOST_WAIT, options.seeds, "the staircase", of_staircase
    )  # fmt: skip
    return [*claims, waiting]


FIGURE = PaperFigure("negative_controls", __doc__, PAPER, PROFILES, produce)
