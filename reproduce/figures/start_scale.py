"""The smaller the start, the more distinct the steps, and the better the theory (a dose and its response; ours).

The linear model of Fig. 1 A-B is trained from starts of six scales, all else equal. The theory is exact in the limit of
a small start. How many steps are distinct, how many modes rise apart and how far (which leaves out
no mode for how it starts), and how much theory is off, are shown beside each other.

The paper says that a small start is needed, and has no such figure: scales, numbers and sizes are ours. The gradient is
descended in the eigenbasis of Γ, in float64, which is the same as training on the pairs, and costs seconds.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reproduce.claims import Claim, worst
from reproduce.figure import Outcome, PaperFigure
from reproduce.options import data_name
from reproduce.plots import Response, doses_figure
from reproduce.processes import map_parallel
from reproduce.records import data_rows, theory_record
from stepwise_lightning import FixedCropPairs, LinearEncoder, SpectrumRecord
from stepwise_lightning.plots import Panel
from stepwise_lightning.spectrum import detect_rises
from stepwise_lightning.spectrum.schedule import log_spaced_steps
from stepwise_lightning.theory import LinearBarlowTwins, feature_cross_correlation

PAPER = "Small initialisation is what the theory assumes; how small it has to be is not shown in the paper."
PROFILES: dict[str, dict[str, Any]] = {
    "smoke": dict(num_pairs=64, crop_size=8, dim=4),
    "cpu": dict(num_pairs=250, crop_size=20, dim=10),
    "full": dict(num_pairs=500, crop_size=20, dim=10, data="cifar10"),
}
# Standard deviations of the initial weights; None for torch's own.
SCALES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, None)
RELATIVE_RATE = 0.1  # 4 × learning rate × γ_1
# Of the smallest start, by profile: smoke has fewer modes, which lie farther apart.
LEAST_DISTINCT = {"smoke": 3, "cpu": 6, "full": 6}
LEAST_SEPARATION = {"smoke": 4.0, "cpu": 1.5, "full": 1.5}


@dataclass
class Result:
    """One seed, trained from one scale."""

    seed: int
    scale: float | None
    record: SpectrumRecord
    theory: SpectrumRecord

    @property
    def dose(self) -> str:
        """What the scale is called."""
        return _name(self.scale)

    def summary(self) -> dict[str, Any]:
        """Return what goes into the table."""
        steps, rises = self.record.detect_steps(), detect_rises(self.record.times, self.record.eigenvalues())
        return {
            "model": "linear",
            "seed": self.seed,
            "start": self.dose,
            "modes": rises.num_modes,
            "distinct": steps.num_distinct,
            "apart": rises.num_apart,
            "separation": rises.separation,
            "deviation": float((self.record.eigenvalues() - self.theory.eigenvalues()).abs().max()),
        }

    def panel(self) -> Panel:
        """Return how to draw it."""
        title = f"{'std ' * (self.scale is not None)}{self.dose}: {self.summary()['distinct']} distinct"
        return Panel(self.record, title=title, theory=self.theory, step_times=())


def _name(scale: float | None) -> str:
    return "ordinary" if scale is None else f"{scale:.0e}".replace("e-0", "e-")


def produce(options: argparse.Namespace, directory: Path) -> Outcome:
    """Train every seed from every scale."""
    for seed in options.seeds:
        _gamma(seed, options)  # every reason to refuse, before any process starts
    results = map_parallel(
        experiment, [(scale, seed, options) for seed in options.seeds for scale in SCALES], "training"
    )
    summaries = [result.summary() for result in results]
    doses = [result.dose for result in results[: len(SCALES)]]
    by_dose = {
        key: np.array([s[key] for s in summaries], dtype=float).reshape(-1, len(SCALES))
        for key in ("distinct", "apart", "separation", "deviation")
    }
    counts = ("distinct steps", "modes that rise apart")
    figure = doses_figure(
        [[result.panel() for result in results[: len(SCALES)]]],
        [
            Response(doses, dict(zip(counts, (by_dose["distinct"], by_dose["apart"]), strict=True)), "number"),
            Response(doses, {"separation": by_dose["separation"]}, "separation / width of rises, median"),
            Response(doses, {"theory": by_dose["deviation"]}, "largest deviation of an eigenvalue", log=True),
        ],
        title="The smaller the start, the more distinct the steps, and the better the theory",
        note=f"linear model, {options.num_pairs} pairs of {options.crop_size}×{options.crop_size} crops, "
        f"{data_name(options.data)}; panels: seed {options.seeds[0]}; below: all seeds, by standard "
        "deviation of the start",
    )  # fmt: skip
    return Outcome(
        figure, ["model", "seed", "start", "step", "time", "quantity", "mode", "experiment", "theory"],
        (row for r in results for row in data_rows(["linear", r.seed, r.dose], r.record, theories=[r.theory])),
        _claims(summaries, options), summaries, {"relative_rate": RELATIVE_RATE},
    )  # fmt: skip


def experiment(scale: float | None, seed: int, options: argparse.Namespace) -> Result:
    """Descend the gradient, W ← W − 4η (W Γ Wᵀ − I) W Γ, for twice as long as theory's last mode takes to 0.93."""
    gamma, basis = torch.linalg.eigh(_gamma(seed, options))
    weights = LinearEncoder(len(gamma), options.dim, scale, seed).weight.detach().double() @ basis
    rate = RELATIVE_RATE / (4 * float(gamma[-1]))
    theory = LinearBarlowTwins(torch.diag(gamma), weights, learning_rate=rate)
    reached = theory.crossing_times(0.93)
    steps = int(2 * reached[reached.isfinite()].max() / rate) + 1
    measured_at, eigenvalues = set(log_spaced_steps(steps, 300)), {}
    identity = torch.eye(options.dim).double()
    for step in range(steps + 1):
        correlated = weights * gamma
        c = correlated @ weights.T
        if step in measured_at:
            eigenvalues[step] = torch.linalg.eigvalsh(c).flip(0)
        weights = weights - 4 * rate * (c - identity) @ correlated
    values, done = torch.stack(list(eigenvalues.values())), torch.tensor(list(eigenvalues))
    record = SpectrumRecord.of(rate * done.double(), values, (1 - values).square().sum(1), steps=done)
    return Result(seed, scale, record, theory_record(record, theory.embedding_eigenvalues(record.times)))


def _gamma(seed: int, options: argparse.Namespace) -> torch.Tensor:
    pairs = FixedCropPairs(
        options.data, options.num_pairs, options.crop_size, seed, root=options.root, download=options.download
    )
    pairs.prepare_data()
    pairs.setup()
    return feature_cross_correlation(pairs.x1, pairs.x2)


def _claims(summaries: list[dict[str, Any]], options: argparse.Namespace) -> list[Claim]:
    small, ordinary = (
        [summary for summary in summaries if summary["start"] == start] for start in map(_name, (SCALES[0], None))
    )
    return [
        worst(
            f"linear_{key}", f"linear model, start of {_name(SCALES[0])}: {sentence}", [s[key] for s in small],
            relation, bound, options.seeds, "ordinary initialisation", [s[key] for s in ordinary],
        )
        for key, sentence, relation, bound in (
            ("distinct", "distinct steps", ">=", LEAST_DISTINCT[options.profile]),
            ("separation", "median of the modes' separation over their width", ">=", LEAST_SEPARATION[options.profile]),
            ("deviation", "largest deviation of an eigenvalue from theory", "<=", 0.02),
        )
    ]  # fmt: skip


FIGURE = PaperFigure("start_scale", __doc__, PAPER, PROFILES, produce)
