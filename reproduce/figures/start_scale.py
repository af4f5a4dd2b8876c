"""Smaller initialisation gives more plateaus and a more accurate theory (not in the paper).

The linear model of Fig. 1 A-B is trained from initial weights of six scales, with otherwise equal settings. The theory
is exact in the limit of small weights. The figure shows the number of distinct steps, the number of steps more than
three rise widths after the previous one (the loss has a plateau before these), the separation of modes (including modes
with large initial eigenvalues), and the deviation from theory.

The paper assumes small initialisation and has no such figure; scales and sizes are chosen here. Gradient descent is
computed in the eigenbasis of Γ, in float64, which is equivalent to training on the pairs and takes seconds.
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
from reproduce.linear_models import descend
from reproduce.options import data_name, fixed_pairs, limit_pairs
from reproduce.plots import Response, conditions_figure
from reproduce.processes import map_parallel
from reproduce.records import data_rows, theory_record
from stepwise_lightning import LinearEncoder, SpectrumRecord
from stepwise_lightning.plots import Panel
from stepwise_lightning.spectrum import detect_rises
from stepwise_lightning.theory import LinearBarlowTwins, feature_cross_correlation

PAPER = "The theory assumes small initialisation; the paper does not show the required scale."
PROFILES: dict[str, dict[str, Any]] = {
    "smoke": dict(num_pairs=64, crop_size=8, dim=4),
    "cpu": dict(num_pairs=250, crop_size=20, dim=10),
    "full": dict(num_pairs=500, crop_size=20, dim=10, data="cifar10"),
}
# Standard deviations of the initial weights; None for the default of torch.
SCALES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, None)
RELATIVE_RATE = 0.1  # 4 × learning rate × γ_1
# Bounds for the smallest scale. The smoke profile has fewer modes, which are farther apart.
MIN_PLATEAUS = {"smoke": 3, "cpu": 3, "full": 3}
MIN_SEPARATION = {"smoke": 4.0, "cpu": 1.5, "full": 1.5}


@dataclass
class Result:
    """Training of one seed from one scale."""

    seed: int
    scale: float | None
    record: SpectrumRecord
    theory: SpectrumRecord

    @property
    def scale_name(self) -> str:
        """Name of the scale in table and figure."""
        return _name(self.scale)

    def summary(self) -> dict[str, Any]:
        """Return the row of the table."""
        steps, rises = self.record.detect_steps(), detect_rises(self.record.times, self.record.eigenvalues())
        return {
            "model": "linear",
            "seed": self.seed,
            "start": self.scale_name,
            "modes": rises.num_modes,
            "distinct": steps.num_distinct,
            "plateaus": steps.num_plateaus,
            "apart": rises.num_apart,
            "separation": rises.separation,
            "deviation": float((self.record.eigenvalues() - self.theory.eigenvalues()).abs().max()),
        }

    def panel(self) -> Panel:
        """Return the panel."""
        title = f"{'std ' * (self.scale is not None)}{self.scale_name}: {self.summary()['plateaus']} after plateaus"
        return Panel(self.record, title=title, theory=self.theory, step_times=())


def _name(scale: float | None) -> str:
    return "ordinary" if scale is None else f"{scale:.0e}".replace("e-0", "e-")


def produce(options: argparse.Namespace, directory: Path) -> Outcome:
    """Train every seed from every scale."""
    limits = limit_pairs(options)
    for seed in options.seeds:
        _gamma(seed, options)  # raises for invalid input before any process starts
    results = map_parallel(
        experiment, [(scale, seed, options) for seed in options.seeds for scale in SCALES], "training"
    )
    summaries = [result.summary() for result in results]
    scales = [result.scale_name for result in results[: len(SCALES)]]
    by_scale = {
        key: np.array([s[key] for s in summaries], dtype=float).reshape(-1, len(SCALES))
        for key in ("distinct", "plateaus", "separation", "deviation")
    }
    counts = ("distinct steps", "steps after a plateau")
    figure = conditions_figure(
        [[result.panel() for result in results[: len(SCALES)]]],
        [
            Response(scales, dict(zip(counts, (by_scale["distinct"], by_scale["plateaus"]), strict=True)), "number"),
            Response(scales, {"separation": by_scale["separation"]}, "separation / width of rises, median"),
            Response(scales, {"theory": by_scale["deviation"]}, "largest deviation of an eigenvalue", log=True),
        ],
        title="Smaller initialisation gives more plateaus and a more accurate theory",
        note=f"linear model, {options.num_pairs} pairs of {options.crop_size}×{options.crop_size} crops, "
        f"{data_name(options.data)}; panels: seed {options.seeds[0]}; bottom: all seeds, against the standard "
        "deviation of the initial weights",
    )  # fmt: skip
    return Outcome(
        figure, ["model", "seed", "start", "step", "time", "quantity", "mode", "experiment", "theory"],
        (row for r in results for row in data_rows(["linear", r.seed, r.scale_name], r.record, theories=[r.theory])),
        _claims(summaries, options), summaries, {"relative_rate": RELATIVE_RATE} | limits,
    )  # fmt: skip


def experiment(scale: float | None, seed: int, options: argparse.Namespace) -> Result:
    """Train for twice the predicted time of the last mode to reach 0.93."""
    gamma, basis = torch.linalg.eigh(_gamma(seed, options))
    weights = LinearEncoder(len(gamma), options.dim, scale, seed).weight.detach().double() @ basis
    rate = RELATIVE_RATE / (4 * float(gamma[-1]))
    theory = LinearBarlowTwins(torch.diag(gamma), weights, learning_rate=rate)
    reached = theory.crossing_times(0.93)
    record, _ = descend(gamma, weights, rate, int(2 * reached[reached.isfinite()].max() / rate) + 1)
    return Result(seed, scale, record, theory_record(record, theory.embedding_eigenvalues(record.times)))


def _gamma(seed: int, options: argparse.Namespace) -> torch.Tensor:
    pairs = fixed_pairs(options, seed)
    return feature_cross_correlation(pairs.x1, pairs.x2)


def _claims(summaries: list[dict[str, Any]], options: argparse.Namespace) -> list[Claim]:
    small, ordinary = (
        [summary for summary in summaries if summary["start"] == start] for start in map(_name, (SCALES[0], None))
    )
    return [
        worst(
            f"linear_{key}", f"linear model, initial std {_name(SCALES[0])}: {sentence}", [s[key] for s in small],
            relation, bound, options.seeds, "ordinary initialisation", [s[key] for s in ordinary],
        )
        for key, sentence, relation, bound in (
            ("plateaus", "steps after a plateau of the loss (three rise widths)", ">=", MIN_PLATEAUS[options.profile]),
            ("separation", "separation over width of modes, median", ">=", MIN_SEPARATION[options.profile]),
            ("deviation", "largest deviation of an eigenvalue from theory", "<=", 0.02),
        )
    ]  # fmt: skip


FIGURE = PaperFigure("start_scale", __doc__, PAPER, PROFILES, produce)
