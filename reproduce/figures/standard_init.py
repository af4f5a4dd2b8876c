"""From ordinary initialisation the steps blur: modes rise together (appendix of the paper).

The three losses are trained from small and from ordinary initialisation, all else equal, once per seed. From small
initialisation modes rise one by one. From ordinary initialisation they start too high and too close to each other to
make steps of their own; how many are still distinct is counted by the same rule.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from reproduce.claims import worst
from reproduce.methods import METHODS, STARTS
from reproduce.options import data_name
from reproduce.outputs import Outcome, PaperFigure
from reproduce.runs import ROW_COLUMNS, trained_runs
from reproduce.training import PROFILES
from stepwise_lightning.plots import eigenvalues_figure

PAPER = (
    "Appendix: the same three losses from ordinary initialisation; eigenvalues rise earlier and more nearly together, "
    "and the steps of the loss are hard to see."
)


def produce(options: argparse.Namespace, directory: Path) -> Outcome:
    """Train both starts for every loss and seed, and count steps."""
    runs = trained_runs(options, variants=STARTS)
    figure = eigenvalues_figure(
        [[r.panel() for r in runs if r.seed == options.seeds[0] and r.variant == start] for start in STARTS],
        [f"{start} initialisation" for start in STARTS],
        title="From ordinary initialisation, modes rise together",
        note=f"ResNet on {data_name(options.data)}, seed {options.seeds[0]}; settings: configs/",
    )
    claims = []
    for loss, method in METHODS.items():
        small, ordinary = (
            [r.steps.num_distinct for r in runs if (r.loss, r.variant) == (loss, start)] for start in STARTS
        )
        sentence = f"{method.title}: distinct steps from ordinary initialisation ({', '.join(map(str, ordinary))})"
        claims.append(worst(f"{loss}_ordinary", sentence, ordinary, "<=", 1, options.seeds))
        fewer = [a - b for a, b in zip(small, ordinary, strict=True)]
        sentence = f"{method.title}: by how many fewer than from small initialisation ({', '.join(map(str, small))})"
        claims.append(worst(f"{loss}_fewer", sentence, fewer, ">=", 1, options.seeds))
    return Outcome(
        figure, ROW_COLUMNS, (row for run in runs for row in run.rows()), claims, [r.summary() for r in runs]
    )


FIGURE = PaperFigure("standard_init", __doc__, PAPER, PROFILES, produce)
