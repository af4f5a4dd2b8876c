"""Where a staircase is seen, and where it is not: one table over starts, augmentations, weight decay and losses.

Each loss is trained from small and from ordinary initialisation, and Barlow Twins also with its last layer ten and a
hundred times as large as that of the small start, with the standard augmentation in place of weak crops, with weight
decay, and with the loss as it is published. Of every run two counts are given. *Distinct steps* are those of
``detect_steps``, which leaves out modes that start high; *modes apart* are those of ``detect_rises``, which does not,
and counts a mode that rises from a tenth to half of its own way after the one before it has finished.

The paper has no such table. It takes longer than the other figures, so that ``all`` leaves it out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from reproduce.claims import Claim, worst
from reproduce.figure import Outcome, PaperFigure
from reproduce.networks.runs import ROW_COLUMNS, Run, trained_runs
from reproduce.networks.training import PROFILES
from reproduce.networks.variants import INITIALIZATIONS, LOSS_SETTINGS, VARIANT_TITLES
from reproduce.options import data_name
from stepwise_lightning.plots import Panel, eigenvalues_figure

PAPER = "Not in the paper: a survey of ours of what its Fig. 1 C-D depends on."
OTHERS = ("alpha0.01", "alpha0.1", "standard_augmentation", "weight_decay", "published_loss")
# Of Barlow Twins, and how many distinct steps every seed must show.
LEAST_STEPS = {"alpha0.01": 5, "standard_augmentation": 3, "weight_decay": 5}


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
        title="Where a staircase is seen, and where it is not",
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
    counts = {
        variant: [run.steps.num_distinct for run in runs if (run.loss, run.variant) == ("barlow_twins", variant)]
        for variant in (*LEAST_STEPS, "ordinary")
    }
    return [
        worst(
            variant, f"{VARIANT_TITLES[variant]}: distinct steps ({', '.join(map(str, counts[variant]))})",
            counts[variant], ">=", least, options.seeds, VARIANT_TITLES["ordinary"], counts["ordinary"],
        )
        for variant, least in LEAST_STEPS.items()
    ]  # fmt: skip


FIGURE = PaperFigure("conditions", __doc__, PAPER, PROFILES, produce)
