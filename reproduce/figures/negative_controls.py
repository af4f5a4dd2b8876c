"""Controls without steps: wrong pairs, other losses and ordinary initialisation; images of noise at two rates.

Barlow Twins is trained as in ``resnet_barlow_twins``, and with second views of other images, without the off-diagonal
term, with the published loss, and from ordinary initialisation. These runs have the same features at initialisation,
and so the same Γ of correct pairs, the same learning rate and number of steps: 4ηΓ_1 and the number of e-folds of the
first mode are equal. The growth rates of the published loss are 4Γ/ε; its learning rate is ε times the others. All must
show fewer distinct steps than any stepwise run.

Γ of images of noise has a first eigenvalue about 40 times smaller, from overlapping crops. At the learning rate of the
photographs they show no step within this time, but at 0.8 times the safe rate of ``stepwise forecast`` for their
features they learn 0 to 6 modes, within fewer e-folds of the first mode than the stepwise run (``e_folds`` in the
table). At the rate with equal 4ηΓ_1 training diverges, because the views of noise share a small part of their variance,
and batches fluctuate.

The paper has no such figure. With wrong pairs Γ vanishes, and no mode grows. Without the off-diagonal term, or with the
small weight that it has in the published loss, every dimension learns the first mode.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reproduce.claims import Claim, worst
from reproduce.figure import Outcome, PaperFigure
from reproduce.networks.runs import ROW_COLUMNS, Run, trained_runs
from reproduce.networks.training import PROFILES
from reproduce.networks.variants import VARIANT_TITLES
from reproduce.options import data_name
from stepwise_lightning import SpectrumRecord
from stepwise_lightning.forecasts.sgd import SGDSettings
from stepwise_lightning.plots import Panel, eigenvalues_figure
from stepwise_lightning.spectrum import Steps, detect_steps
from stepwise_lightning.theory import growth_matrix

PAPER = "Not in the paper: controls for its Fig. 1 C-D."
WITHOUT_STEPS = ("wrong_pairs", "no_off_diagonal", "ordinary", "published_loss")
NOISE = ("noise_images", "noise_safe_rate")
VARIANTS = ("small", *WITHOUT_STEPS, *NOISE)
NETWORKS = [("barlow_twins", variant) for variant in VARIANTS]
MAX_STEPS = 2
# Steps of noise at the rate of the photographs, and at 0.8 times its safe rate, except in the smoke profile.
MAX_NOISE_STEPS, MIN_NOISE_STEPS = 0, 1


def produce(options: argparse.Namespace, directory: Path) -> Outcome:
    """Train the stepwise run and its controls for every seed, and count steps."""
    runs = trained_runs(options, NETWORKS)
    steps = min(int(run.record.steps[-1]) for run in runs)
    panels = [_panel(run, steps) for run in runs if run.seed == options.seeds[0]]
    figure = eigenvalues_figure(
        [panels[:4], panels[4:]],
        ["", ""],
        title="Stepwise learning needs correct pairs, decorrelation and small initialisation",
        same_time=False,
        note=f"Barlow Twins, ResNet on {data_name(options.data)}, seed {options.seeds[0]}, {steps} steps",
    )
    rows = (row for run in runs for row in run.rows())
    return Outcome(figure, ROW_COLUMNS, rows, _claims(runs, steps, options), [_summary(run, steps) for run in runs])


def _panel(run: Run, steps: int) -> Panel:
    """Return a panel of the compared training steps."""
    within = _compared(run, steps)
    record = SpectrumRecord.of(run.record.times[within], run.eigenvalues()[within], matrix=run.loss_settings.matrix)
    detected = _steps(run, steps)
    title = f"{VARIANT_TITLES[run.variant]}: {detected.num_distinct} distinct"
    return Panel(record, run.loss_settings.matrix, title, step_times=detected.step_times)


def _compared(run: Run, steps: int) -> Tensor:
    """Return a mask of the measurements that are compared: all for noise at its own rate, else the first ``steps``."""
    return run.record.steps <= (math.inf if run.variant == "noise_safe_rate" else steps)


def _steps(run: Run, steps: int) -> Steps:
    """Detect steps in the compared training steps."""
    within = _compared(run, steps)
    return detect_steps(run.record.times[within], run.eigenvalues()[within])


def _summary(run: Run, steps: int) -> dict[str, Any]:
    """Return the row of the table; for the stepwise run and noise with 4ηΓ_1 × compared steps."""
    if run.variant not in ("small", *NOISE):
        return run.summary() | {"e_folds": None}
    sgd = SGDSettings.of(run.module, 0, 1)
    rates = torch.linalg.eigvalsh(growth_matrix(sgd.loss, *run.features, 1, **sgd.settings))
    time = float(run.record.times[_compared(run, steps)][-1]) / (1 - sgd.momentum)
    return run.summary() | {"e_folds": round(float(rates[-1]) * time, 1)}


def _claims(runs: list[Run], steps: int, options: argparse.Namespace) -> list[Claim]:
    counts = {
        variant: [_steps(run, steps).num_distinct for run in runs if run.variant == variant] for variant in VARIANTS
    }

    def claim(variant: str, relation: str, bound: int, *control: str) -> Claim:
        sentence = f"{VARIANT_TITLES[variant]}: distinct steps ({', '.join(map(str, counts[variant]))})"
        controls = [(VARIANT_TITLES[name], counts[name]) for name in control]
        return worst(
            variant, sentence, counts[variant], relation, bound, options.seeds, *(controls[0] if controls else ())
        )

    claims = [claim(variant, "<=", MAX_STEPS, "small") for variant in WITHOUT_STEPS]
    if options.profile == "smoke":
        return [*claims, claim("noise_images", "<=", MAX_STEPS)]
    claims.append(claim("noise_images", "<=", MAX_NOISE_STEPS, "noise_safe_rate"))
    claims.append(claim("noise_safe_rate", ">=", MIN_NOISE_STEPS, "wrong_pairs"))
    return claims


FIGURE = PaperFigure("negative_controls", __doc__, PAPER, PROFILES, produce, networks=NETWORKS)
