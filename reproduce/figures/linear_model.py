"""Linear Barlow Twins learns one eigenmode at a time, as predicted (Fig. 1 A-B of the paper).

A linear model is trained by full-batch gradient descent on pairs of random crops, from small and from ordinary
initialisation. The claims compare it with the closed form. Controls are the theory without pairs, ordinary
initialisation, and another threshold. A third run, in the eigenbasis of Γ in float64, begins with weights aligned with
the eigenvectors, for which the paper's W(t) is exact in the limit of small steps, and its recursion for finite steps.
The weights at the end have the smallest norm of all global minima of the loss; from ordinary initialisation
training ends at another minimum.

Settings from the paper: 500 pairs, two random 20×20 crops each, 10 dimensions, full batch, small initialisation. Not
stated in the paper, chosen here: the scale of the initialisation, the learning rate (from 4 × rate × γ_1), and the
duration (until the last mode reaches 0.93 in theory).
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from reproduce.claims import Claim, worst
from reproduce.figure import Outcome, PaperFigure
from reproduce.linear_models import excess_norm, train_aligned, without_pairs
from reproduce.options import data_name, fixed_pairs
from reproduce.processes import map_parallel, step_progress
from reproduce.records import data_rows, theory_record, write_events
from stepwise_lightning import BarlowTwins, FixedCropPairs, LinearEncoder, SpectrumLogger, SpectrumRecord
from stepwise_lightning.errors import UserError
from stepwise_lightning.plots import Panel, trajectories_figure
from stepwise_lightning.spectrum import crossing_times
from stepwise_lightning.theory import LinearBarlowTwins, feature_cross_correlation

PAPER = (
    "Fig. 1 A-B: loss and eigenvalues of a linear Barlow Twins model on CIFAR-10 from small initialisation; the "
    "eigenvalues rise one at a time, along the dashed theory, and each rise is a step down of the loss."
)
# relative_rate is 4 × learning rate × γ_1: gradient descent is stable below 1 and close to gradient flow below about
# 0.1. The theory includes finite steps (at 0.3 eigenvalues deviate by up to 0.016; photographs, seeds 0 and 2).
PROFILES: dict[str, dict[str, Any]] = {
    "smoke": dict(num_pairs=64, crop_size=8, dim=4, init_std=1e-4, relative_rate=0.1, precision="32-true"),
    "cpu": dict(num_pairs=250, crop_size=20, dim=10, init_std=1e-4, relative_rate=0.2, precision="32-true"),
    "full": dict(
        num_pairs=500, crop_size=20, dim=10, init_std=1e-5, relative_rate=0.05, precision="64-true", data="cifar10"
    ),
}
# The control only needs to be stable, not close to gradient flow.
CONTROL_RELATIVE_RATE = 0.4
# Smallest eigenvalue that is compared with theory; float32 weights do not resolve smaller ones next to learned modes.
MIN_EIGENVALUE = 1e-9
# Above this overlap with a neighbour the paper's step times are marked as not applicable.
CLOSE_NEIGHBOURS = 0.3


@dataclass
class Plan:
    """Encoder, learning rate, number of steps and predictions of a training run."""

    name: str
    encoder: LinearEncoder
    weights0: Tensor
    learning_rate: float
    steps: int
    theory: LinearBarlowTwins
    flow: LinearBarlowTwins
    predicted_steps: Tensor


@dataclass
class Result:
    """Results of one seed."""

    panels: list[Panel]
    measured: dict[str, float]
    modes: list[dict[str, Any]]
    rows: list[list[Any]]
    settings: dict[str, float]


def produce(options: argparse.Namespace, directory: Path) -> Outcome:
    """Train every seed from small and from ordinary initialisation, and compare with the closed form."""
    for seed in options.seeds:
        _prepare(seed, options)  # raises for invalid input before any process starts
    items = [(seed, options, directory) for seed in options.seeds]
    results = map_parallel(experiment, items, "linear_model")
    figure = trajectories_figure(
        results[0].panels,
        title="Linear Barlow Twins learns one eigenmode at a time",
        loss_label="loss  ‖C − I‖²",
        steps_label="predicted step",
        note=f"{options.num_pairs} pairs of {options.crop_size}×{options.crop_size} crops from "
        f"{data_name(options.data)}; seed {options.seeds[0]}",
    )
    return Outcome(
        figure, ["seed", "run", "step", "time", "quantity", "mode", "experiment", "theory", "theory_flow", "theory_qr"],
        (row for result in results for row in result.rows), _claims([r.measured for r in results], options.seeds),
        [row for result in results for row in result.modes],
        {"control_relative_rate": CONTROL_RELATIVE_RATE, "by_seed": [result.settings for result in results]},
    )  # fmt: skip


def experiment(seed: int, options: argparse.Namespace, directory: Path) -> Result:
    """Train one seed from both initialisations, and measure the quantities of the claims."""
    pairs, small, control = _prepare(seed, options)
    plans = (small, control)
    logs = [_train(plan, seed, pairs, options.precision, directory) for plan in plans]
    records = [log.record for log in logs]
    predictions = [_predictions(plan, record) for plan, record in zip(plans, records, strict=True)]
    theory = predictions[0][0]
    # With the same tags TensorBoard draws theory and experiment in one chart.
    write_events(directory / "tensorboard" / f"small_init_seed{seed}_theory" / logs[0].directory.name, theory)
    # The closed form assumes small initialisation.
    measured, modes = _compare(seed, small, records, without_pairs(pairs, small.weights0))
    measured["objective_control"] = _asymmetry(small.encoder, pairs)
    measured["norm"], measured["norm_control"] = (
        excess_norm(plan.encoder, plan.theory.eigenvalues, pairs) for plan in plans
    )
    aligned, panel = train_aligned(seed, pairs, options.dim)
    measured |= aligned
    panels = [_panel(small, records[0], theory, small.predicted_steps), _panel(control, records[1], None, ()), panel]
    settings = {f"{plan.name}_learning_rate": plan.learning_rate for plan in plans}
    settings |= {f"{plan.name}_steps": plan.steps for plan in plans}
    rows = [
        row
        for plan, record, theories in zip(plans, records, predictions, strict=True)
        for row in data_rows([seed, plan.name], record, theories=theories)
    ]
    return Result(panels, measured, modes, rows, {"seed": seed} | settings)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this figure."""
    group = parser.add_argument_group("settings with defaults from the profile")
    group.add_argument("--num-pairs", type=int, help="n, number of images")
    group.add_argument("--crop-size", type=int, help="side of the crops, in pixels")
    group.add_argument("--dim", type=int, help="d, embedding dimension")
    group.add_argument("--init-std", type=float, help="standard deviation of the small initial weights")
    group.add_argument("--learning-rate", type=float, help="learning rate of the run from small initialisation")


def _prepare(seed: int, options: argparse.Namespace) -> tuple[FixedCropPairs, Plan, Plan]:
    """Load the data and predict both runs; raise for invalid input before anything is written."""
    pairs = fixed_pairs(options, seed)
    gamma = feature_cross_correlation(pairs.x1, pairs.x2)
    top = float(torch.linalg.eigvalsh(gamma)[-1])
    rate = options.relative_rate / (4 * top) if options.learning_rate is None else options.learning_rate
    small = _plan("small_init", options.init_std, rate, gamma, options.dim, seed)
    control = _plan("ordinary_init", None, CONTROL_RELATIVE_RATE / (4 * top), gamma, options.dim, seed)
    return pairs, small, control


def _plan(name: str, init_std: float | None, rate: float, gamma: Tensor, dim: int, seed: int) -> Plan:
    encoder = LinearEncoder(len(gamma), dim, init_std, seed=seed)
    weights0 = encoder.weight.detach().clone()
    theory = LinearBarlowTwins(gamma, weights0, learning_rate=rate)
    reached = theory.crossing_times(0.93)
    if not reached.isfinite().any():
        raise UserError(f"no mode rises from init_std {init_std}: choose init_std > 0 and data with γ_1 > 0")
    steps = math.ceil(float(reached[reached.isfinite()].max()) / rate)
    return Plan(
        name, encoder, weights0, rate, steps, theory, LinearBarlowTwins(gamma, weights0), theory.crossing_times()
    )


def _train(plan: Plan, seed: int, pairs: FixedCropPairs, precision: Any, directory: Path) -> SpectrumLogger:
    """Train with Lightning, and return the logger."""
    pairs.hparams["steps_per_epoch"] = plan.steps
    module = BarlowTwins(plan.encoder, plan.learning_rate, off_diagonal_weight=1.0, normalize=False)
    log = SpectrumLogger(matrices=["cross_correlation", "covariance"], num_points=300)
    logger = TensorBoardLogger(directory / "tensorboard", name=f"{plan.name}_seed{seed}", default_hp_metric=False)
    trainer = L.Trainer(
        max_steps=plan.steps, accelerator="cpu", precision=precision, logger=logger,
        callbacks=[log, *step_progress(f"linear_model, {plan.name}", plan.steps)], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        log_every_n_steps=min(50, plan.steps),
    )  # fmt: skip
    trainer.fit(module, datamodule=pairs)
    return log


def _predictions(plan: Plan, record: SpectrumRecord) -> list[SpectrumRecord]:
    """Return the predictions of the finite-step theory, its continuous-time limit, and the paper's QR form."""
    predictions = (
        plan.theory.embedding_eigenvalues(record.times),
        plan.flow.embedding_eigenvalues(record.times),
        plan.flow.embedding_eigenvalues(record.times, method="qr"),
    )
    return [theory_record(record, eigenvalues) for eigenvalues in predictions]


def _compare(
    seed: int, plan: Plan, records: list[SpectrumRecord], unpaired: LinearBarlowTwins
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Return the numbers of the claims and one row per mode; ``records`` are the run and its control."""
    (record, control), theory = records, plan.theory
    crossed = crossing_times(record.times, record.eigenvalues(), level=0.5)
    steps = record.detect_steps()
    numbers: dict[str, float] = {
        "rising": int(plan.predicted_steps.isfinite().sum()),
        "distinct": steps.num_distinct,
        "distinct_control": control.detect_steps().num_distinct,
        # The threshold is a tenth of the largest final eigenvalue, which is 1.
        "detected": _relative_error(theory.crossing_times(0.1), steps.step_times),
        "detected_control": _relative_error(theory.crossing_times(0.01), steps.step_times),
    }
    objective = record.losses - (1 - record.eigenvalues()).square().sum(1)
    numbers["objective"] = float(objective[objective.isfinite()].abs().max())
    for suffix, prediction in (("", theory), ("_control", unpaired)):
        numbers["crossed" + suffix] = _relative_error(prediction.crossing_times(0.5), crossed)
        numbers |= {name + suffix: value for name, value in _deviations(record, prediction).items()}
    table = [
        {
            "seed": seed,
            "mode": mode + 1,
            "gamma": float(theory.eigenvalues[mode]),
            "measured_step_time": float(crossed[mode]),
            "predicted_step_time": float(plan.predicted_steps[mode]),
            "qr_step_time": float(theory.step_times[mode]),
            "qr_neighbours_too_close": bool(theory.neighbour_overlap[mode] > CLOSE_NEIGHBOURS),
        }
        for mode in range(len(crossed))
    ]
    return numbers, table


@torch.no_grad()
def _asymmetry(encoder: LinearEncoder, pairs: FixedCropPairs) -> float:
    """Return the increase of the final loss for C = z1ᵀ z2 / n, without the transpose."""
    z1, z2 = (encoder(x).double() for x in (pairs.x1, pairs.x2))
    c = z1.T @ z2 / len(z1)
    return float(((c - c.T) / 2).square().sum())


def _relative_error(predicted: Tensor, measured: Tensor) -> float:
    """Return the largest relative error of the predicted modes; infinite if any was not measured."""
    rising = predicted.isfinite()
    return float(((measured - predicted) / predicted)[rising].abs().nan_to_num(nan=math.inf).max())


def _deviations(record: SpectrumRecord, theory: LinearBarlowTwins) -> dict[str, float]:
    """Return the largest deviations of eigenvalues, their logarithms and the loss from theory at any logged step."""
    predicted, measured = theory.embedding_eigenvalues(record.times), record.eigenvalues()
    risen = predicted > MIN_EIGENVALUE
    # Eigenvalues of C can be negative.
    logs = measured[risen].clamp(min=MIN_EIGENVALUE / 100).log() - predicted[risen].log()
    losses = record.losses - theory_record(record, predicted).losses
    return {
        "deviation": float((measured - predicted).abs().max()),
        "log_deviation": float(logs.abs().max()),
        "loss": float(losses[losses.isfinite()].abs().max()),
    }


def _claims(by_seed: list[dict[str, float]], seeds: list[int]) -> list[Claim]:
    rising = max(numbers["rising"] for numbers in by_seed)
    ordinary, unpaired = "ordinary initialisation", "theory without pairs"
    return [
        worst(
            name, sentence, [numbers[name] for numbers in by_seed], relation, bound, seeds, control,
            [numbers[f"{name}_control"] for numbers in by_seed],
        )
        for name, sentence, relation, bound, control in (
            ("distinct", "distinct steps", ">=", max(2, math.ceil(rising / 2)), ordinary),
            ("crossed", "largest relative error of a predicted crossing time (λ = ½)", "<=", 0.01, unpaired),
            ("detected", "largest relative error of a detected step time (λ = 0.1)", "<=", 0.02, "threshold λ = 0.01"),
            ("deviation", "largest deviation of any eigenvalue at any logged step", "<=", 0.05, unpaired),
            ("log_deviation", f"largest deviation of log λ at any logged step, λ > {MIN_EIGENVALUE:g}", "<=", 0.1,
             unpaired),
            ("objective", "largest difference between the loss and ‖C − I‖² of the eigenvalues", "<=", 1e-4,
             "C without its transpose"),
            ("loss", "largest deviation of the loss at any logged step", "<=", 0.05, unpaired),
            ("aligned", "aligned start: largest relative error of the weights W(t)", "<=", 0.03, unpaired),
            ("recursion", "aligned start: the same with finite steps", "<=", 1e-6, "theory of gradient flow"),
            ("norm", "relative distance of the norm of the final weights from the smallest", "<=", 0.05, ordinary),
        )
    ]  # fmt: skip


def _panel(plan: Plan, record: SpectrumRecord, theory: SpectrumRecord | None, step_times: Tensor | tuple[()]) -> Panel:
    count = record.detect_steps().num_distinct
    title = f"{plan.name.replace('_init', ' initialisation')}: {count} distinct step{'s' * (count != 1)}"
    return Panel(record, title=title, theory=theory, step_times=step_times)


FIGURE = PaperFigure("linear_model", __doc__, PAPER, PROFILES, produce, add_options)
