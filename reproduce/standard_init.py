"""From ordinary initialisation the steps blur: modes rise together (appendix of the paper).

The three losses are trained from small and from ordinary initialisation, all else equal, once per seed. From small
initialisation modes rise one by one. From ordinary initialisation they start too high and too close to each other to
make steps of their own; how many are still distinct is counted by the same rule.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from reproduce.common import Claim, Outcome, data_name, run_figure, seeds_of
from reproduce.runs import LOSSES, ROW_COLUMNS, TITLES, trained_runs
from reproduce.training import PROFILES
from stepwise_lightning.plots.trajectories import eigenvalues_figure

PAPER = (
    "Appendix: the same three losses from ordinary initialisation; eigenvalues rise earlier and more nearly together, "
    "and the steps of the loss are hard to see."
)
STARTS = ("small", "ordinary")


def main(arguments: list[str] | None = None) -> int:
    """Run the experiment; return 0 if every claim holds, 1 if one fails, 2 for bad input."""
    return run_figure("standard_init", __doc__, PAPER, PROFILES, produce, arguments)


def produce(options: argparse.Namespace, directory: Path) -> Outcome:
    """Train both starts for every loss and seed, and count steps."""
    runs = trained_runs(options, starts=STARTS)
    figure = eigenvalues_figure(
        [[r.trajectory() for r in runs if r.seed == options.seeds[0] and r.start == start] for start in STARTS],
        [f"{start} initialisation" for start in STARTS],
        title="From ordinary initialisation, modes rise together",
        note=f"ResNet on {data_name(options.data)}, seed {options.seeds[0]}; settings: configs/",
    )
    claims = []
    for loss in LOSSES:
        small, ordinary = (
            [r.found.num_distinct for r in runs if (r.loss, r.start) == (loss, start)] for start in STARTS
        )
        what = f"{TITLES[loss]}: distinct steps from ordinary initialisation, {', '.join(map(str, ordinary))}"
        claims.append(Claim(f"{loss}_ordinary", f"{what} for {seeds_of(options)}; most", max(ordinary), "<=", 1))
        fewer = min(a - b for a, b in zip(small, ordinary, strict=True))
        what = f"{TITLES[loss]}: fewer than from small initialisation ({', '.join(map(str, small))}), by at least"
        claims.append(Claim(f"{loss}_fewer", what, fewer, ">=", 1))
    return Outcome(
        figure, ROW_COLUMNS, (row for run in runs for row in run.rows()), claims, [r.summary() for r in runs]
    )


if __name__ == "__main__":
    sys.exit(main())
