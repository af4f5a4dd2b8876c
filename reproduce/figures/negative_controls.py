"""Controls that must not learn in steps: wrong pairs, noise, other losses and ordinary initialisation.

Barlow Twins is trained as in ``resnet_barlow_twins``, and in five ways that violate an assumption of the theory: second
views of other images, images of noise, no off-diagonal term, the published loss with its small weight and its
normalisation, and ordinary initialisation. All runs are compared over the number of training steps of the shortest run,
450 on CPUs. Four controls must show fewer distinct steps than any stepwise run. The published loss showed up to three
steps in 600, too many to distinguish it by a count. It learns its first mode without a plateau, within 3 % of the
training steps.

The paper has no such figure. With wrong pairs Γ vanishes, and no mode grows. Noise has a small Γ from overlapping
crops, with nearly equal first modes. Without the off-diagonal term every dimension learns the first mode. The published
loss is invariant to the scale of the embedding and has no plateau before the first mode at any initial scale.
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

PAPER = "Not in the paper: controls for its Fig. 1 C-D."
WITHOUT_STEPS = ("wrong_pairs", "noise_images", "no_off_diagonal", "ordinary")
CONTROLS = (*WITHOUT_STEPS, "published_loss")
NETWORKS = [("barlow_twins", variant) for variant in ("small", *CONTROLS)]
STEPWISE = "small initialisation"
MAX_STEPS = 2
MAX_WAIT = 0.03  # time until the first mode is learned, as a fraction of the training steps


def produce(options: argparse.Namespace, directory: Path) -> Outcome:
    """Train the stepwise run and its controls for every seed, and count steps."""
    runs = trained_runs(options, NETWORKS)
    steps = min(int(run.record.steps[-1]) for run in runs)
    panels = [_panel(run, steps) for run in runs if run.seed == options.seeds[0]]
    figure = eigenvalues_figure(
        [panels[:3], panels[3:]],
        ["", ""],
        title="Stepwise learning needs pairs, images, decorrelation and small initialisation",
        same_time=False,
        note=f"Barlow Twins, ResNet on {data_name(options.data)}, seed {options.seeds[0]}, {steps} steps",
    )
    rows = (row for run in runs for row in run.rows())
    return Outcome(figure, ROW_COLUMNS, rows, _claims(runs, steps, options), [run.summary() for run in runs])


def _panel(run: Run, steps: int) -> Panel:
    """Return a panel of the first ``steps`` training steps."""
    within = run.record.steps <= steps
    record = SpectrumRecord.of(run.record.times[within], run.eigenvalues()[within], matrix=run.loss_settings.matrix)
    detected = _steps(run, steps)
    title = f"{VARIANT_TITLES[run.variant]}: {detected.num_distinct} distinct"
    return Panel(record, run.loss_settings.matrix, title, step_times=detected.step_times)


def _steps(run: Run, steps: int) -> Steps:
    """Detect steps in the first ``steps`` training steps."""
    within = run.record.steps <= steps
    return detect_steps(run.record.times[within], run.eigenvalues()[within])


def _wait(run: Run, steps: int) -> float:
    """Return the fraction of ``steps`` until the first mode is learned; 1 if no mode is learned."""
    times = _steps(run, steps).step_times.nan_to_num(nan=math.inf, posinf=math.inf)
    return min(float(times.min() / run.record.times[run.record.steps <= steps][-1]), 1.0)


def _claims(runs: list[Run], steps: int, options: argparse.Namespace) -> list[Claim]:
    by_variant = {variant: [run for run in runs if run.variant == variant] for variant in ("small", *CONTROLS)}
    counts = {
        variant: [_steps(run, steps).num_distinct for run in variant_runs]
        for variant, variant_runs in by_variant.items()
    }
    claims = []
    for variant in WITHOUT_STEPS:
        sentence = f"{VARIANT_TITLES[variant]}: distinct steps ({', '.join(map(str, counts[variant]))})"
        claims.append(
            worst(variant, sentence, counts[variant], "<=", MAX_STEPS, options.seeds, STEPWISE, counts["small"])
        )
    sentence = "published loss: fraction of the training steps until the first mode is learned"
    waits, stepwise = ([_wait(run, steps) for run in by_variant[name]] for name in ("published_loss", "small"))
    claims.append(worst("published_loss", sentence, waits, "<=", MAX_WAIT, options.seeds, STEPWISE, stepwise))
    return claims


FIGURE = PaperFigure("negative_controls", __doc__, PAPER, PROFILES, produce, networks=NETWORKS)
