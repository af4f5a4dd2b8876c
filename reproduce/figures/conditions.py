"""Stepwise learning for different initialisations, augmentations, weight decay and losses.

Each loss is trained from small and from ordinary initialisation. Barlow Twins is also trained with a last layer ten and
a hundred times larger than the small initialisation, with the standard augmentation instead of weak crops, with weight
decay, and with the published loss. Each run has two counts: *distinct steps* (``detect_steps``), which exclude modes
with large initial eigenvalues, and *modes apart* (``detect_rises``), which include them. A mode is apart if its rise,
from a tenth to half of its range, begins after the previous rise has ended.

The paper has no such table. The figure takes longer than the others, and ``all`` does not include it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from reproduce.claims import Claim, worst
from reproduce.figure import Outcome, PaperFigure
from reproduce.networks.runs import ROW_COLUMNS, Run, distinct_steps, trained_runs
from reproduce.networks.training import PROFILES
from reproduce.networks.variants import INITIALIZATIONS, LOSS_SETTINGS, VARIANT_TITLES
from reproduce.options import data_name
from stepwise_lightning.plots import Panel, eigenvalues_figure

PAPER = "Not in the paper: conditions under which the result of its Fig. 1 C-D holds."
OTHERS = ("alpha0.01", "alpha0.1", "standard_augmentation", "weight_decay", "published_loss")
# Minimum number of distinct steps of Barlow Twins for every seed.
MIN_STEPS = {"alpha0.01": 5, "standard_augmentation": 3, "weight_decay": 5}


def produce(options: argparse.Namespace, directory: Path) -> Outcome:
    """Train every loss under every condition for every seed, and count steps."""
    kinds = [(loss, start) for loss in LOSS_SETTINGS for start in INITIALIZATIONS] + [
        ("barlow_twins", other) for other in OTHERS
    ]
    runs = trained_runs(options, kinds)
    first = {(run.loss, run.variant): _panel(run) for run in runs if run.seed == options.seeds[0]}
    figure = eigenvalues_figure(
        [
            [first["barlow_twins", variant] for variant in ("small", "alpha0.01", "alpha0.1", "ordinary")],
            [first["barlow_twins", variant] for variant in OTHERS[2:]] + [first["simclr", "small"]],
            [first[kind] for kind in (("simclr", "ordinary"), ("vicreg", "small"), ("vicreg", "ordinary"))],
        ],
        ["", "", ""],
        same_time=False,
        title="Stepwise learning under different conditions",
        note=f"ResNet on {data_name(options.data)}, seed {options.seeds[0]}",
    )
    rows = (row for run in runs for row in run.rows())
    return Outcome(figure, ROW_COLUMNS, rows, _claims(runs, options), [run.summary() for run in runs])


def _panel(run: Run) -> Panel:
    panel = run.panel()
    loss = "" if run.loss == "barlow_twins" else f"{run.loss_settings.title}, "
    panel.title = f"{loss}{VARIANT_TITLES[run.variant]}: {run.steps.num_distinct} distinct"
    return panel


def _claims(runs: list[Run], options: argparse.Namespace) -> list[Claim]:
    counts = {variant: distinct_steps(runs, "barlow_twins", variant) for variant in (*MIN_STEPS, "ordinary")}
    return [
        worst(
            variant, f"{VARIANT_TITLES[variant]}: distinct steps ({', '.join(map(str, counts[variant]))})",
            counts[variant], ">=", least, options.seeds, VARIANT_TITLES["ordinary"], counts["ordinary"],
        )
        for variant, least in MIN_STEPS.items()
    ]  # fmt: skip


FIGURE = PaperFigure("conditions", __doc__, PAPER, PROFILES, produce)
