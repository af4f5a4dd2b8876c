"""Linear Barlow Twins learns one eigenmode at a time, when and as predicted (Fig. 1 A-B of the paper).

A linear model is trained by full-batch gradient descent on pairs of random crops, once from small and once from
ordinary initialisation. The closed form is drawn on top; claims compare the two. Settings from the paper: 500 pairs,
two random 20×20 crops each, 10 dimensions, full batch, small initialisation. Not stated there, ours: the scale of the
initialisation, the learning rate (from 4 × rate × γ_1), the duration (until theory has the last mode at 0.93).
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from reproduce.common import Claim, Outcome, data_name, each, is_alone, progress_bar, run_figure, seeds_of
from stepwise_lightning import BarlowTwins, FixedCropPairs, LinearEncoder, SpectrumLogger
from stepwise_lightning.plots.trajectories import Trajectory, trajectories_figure
from stepwise_lightning.spectrum.measures import crossing_times, detect_steps
from stepwise_lightning.theory import LinearBarlowTwins, feature_cross_correlation

PAPER = (
    "Fig. 1 A-B: loss and eigenvalues of a linear Barlow Twins model on CIFAR-10 from small initialisation; the "
    "eigenvalues rise one at a time, along the dashed theory, and each rise is a step down of the loss."
)
# relative_rate is 4 × learning rate × γ_1: gradient descent is stable below 1, close to gradient flow below about 0.1.
PROFILES: dict[str, dict[str, Any]] = {
    "smoke": dict(num_pairs=64, crop_size=8, dim=4, init_std=1e-4, relative_rate=0.1, precision="32-true"),
    "cpu": dict(num_pairs=250, crop_size=20, dim=10, init_std=1e-4, relative_rate=0.1, precision="32-true"),
    "full": dict(
        num_pairs=500, crop_size=20, dim=10, init_std=1e-5, relative_rate=0.05, precision="64-true", data="cifar10"
    ),
}
# The control only needs to be stable, not close to the flow.
CONTROL_RELATIVE_RATE = 0.4
# Above this overlap with a neighbour the paper's step times are marked as not applicable.
CLOSE_NEIGHBOURS = 0.3


@dataclass
class Run:
    """A training run, ready to start: its encoder, learning rate, length, and predictions."""

    name: str
    encoder: LinearEncoder
    learning_rate: float
    steps: int
    theory: LinearBarlowTwins
    flow: LinearBarlowTwins
    predicted_steps: Tensor


@dataclass
class Result:
    """What one seed came to."""

    trajectories: list[Trajectory]
    measured: dict[str, float]
    modes: list[dict[str, Any]]
    rows: list[list[Any]]
    settings: dict[str, float]


def main(arguments: list[str] | None = None) -> int:
    """Run the experiment; return 0 if every claim holds, 1 if one fails, 2 for bad input."""
    return run_figure("linear_model", __doc__, PAPER, PROFILES, produce, arguments, _more_options)


def produce(options: argparse.Namespace, directory: Path) -> Outcome:
    """Train every seed from small and from ordinary initialisation, and compare with the closed form."""
    for seed in options.seeds:
        _prepare(seed, options)  # every reason to refuse, before any process starts
    items = [(seed, options, directory) for seed in options.seeds]
    results = each(experiment, items, "training linear models")
    figure = trajectories_figure(
        results[0].trajectories,
        title="Linear Barlow Twins learns one eigenmode at a time",
        loss_label="loss  ‖C − I‖²",
        steps_label="predicted step",
        note=f"{options.num_pairs} pairs of {options.crop_size}×{options.crop_size} crops from "
        f"{data_name(options.data)}; seed {options.seeds[0]}",
    )
    return Outcome(
        figure, ["seed", "run", "step", "time", "quantity", "mode", "experiment", "theory", "theory_flow", "theory_qr"],
        (row for result in results for row in result.rows), _claims([r.measured for r in results], options),
        [row for result in results for row in result.modes],
        {"control_relative_rate": CONTROL_RELATIVE_RATE, "by_seed": [result.settings for result in results]},
    )  # fmt: skip


def experiment(seed: int, options: argparse.Namespace, directory: Path) -> Result:
    """Train one seed twice, and measure what the claims are about."""
    pairs, small, control = _prepare(seed, options)
    logs = {run.name: _train(run, seed, pairs, options.precision, directory) for run in (small, control)}
    _log_theory(small, logs[small.name])
    measured, modes = _compare(seed, small, control, logs)
    settings = {f"{run.name}_learning_rate": run.learning_rate for run in (small, control)}
    settings |= {f"{run.name}_steps": run.steps for run in (small, control)}
    trajectories = [_trajectory(run, logs[run.name], with_theory=run is small) for run in (small, control)]
    rows = [[seed, *row] for run in (small, control) for row in _rows(run, logs[run.name])]
    return Result(trajectories, measured, modes, rows, {"seed": seed} | settings)


def _more_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("settings that the profile chooses, unless given")
    group.add_argument("--num-pairs", type=int, help="n, number of images")
    group.add_argument("--crop-size", type=int, help="side of the crops, in pixels")
    group.add_argument("--dim", type=int, help="d, embedding dimension")
    group.add_argument("--init-std", type=float, help="standard deviation of the small initial weights")
    group.add_argument("--learning-rate", type=float, help="of the run from small initialisation")


def _prepare(seed: int, options: argparse.Namespace) -> tuple[FixedCropPairs, Run, Run]:
    """Load data, predict, and find every reason to refuse before anything is written."""
    pairs = FixedCropPairs(
        options.data, options.num_pairs, options.crop_size, seed, root=options.root, download=options.download
    )
    pairs.prepare_data()
    pairs.setup()
    gamma = feature_cross_correlation(pairs.x1, pairs.x2)
    top = float(torch.linalg.eigvalsh(gamma)[-1])
    rate = options.relative_rate / (4 * top) if options.learning_rate is None else options.learning_rate
    small = _plan("small_init", options.init_std, rate, gamma, options.dim, seed)
    control = _plan("ordinary_init", None, CONTROL_RELATIVE_RATE / (4 * top), gamma, options.dim, seed)
    return pairs, small, control


def _plan(name: str, init_std: float | None, rate: float, gamma: Tensor, dim: int, seed: int) -> Run:
    encoder = LinearEncoder(len(gamma), dim, init_std, seed=seed)
    weights0 = encoder.weight.detach()
    theory = LinearBarlowTwins(gamma, weights0, learning_rate=rate)
    reached = theory.crossing_times(0.93)
    if not reached.isfinite().any():
        raise ValueError(f"no mode is ever learned from init_std {init_std}: it must be above 0, with γ_1 > 0")
    steps = math.ceil(float(reached[reached.isfinite()].max()) / rate)
    return Run(name, encoder, rate, steps, theory, LinearBarlowTwins(gamma, weights0), theory.crossing_times())


def _train(run: Run, seed: int, pairs: FixedCropPairs, precision: Any, directory: Path) -> SpectrumLogger:
    """Train through Lightning; return the spectra."""
    pairs.hparams["steps_per_epoch"] = run.steps
    module = BarlowTwins(run.encoder, run.learning_rate, off_diagonal_weight=1.0, normalize=False)
    spectra = SpectrumLogger(matrices=["cross_correlation", "covariance"], num_points=300)
    logger = TensorBoardLogger(directory / "tensorboard", name=f"{run.name}_seed{seed}", default_hp_metric=False)
    trainer = L.Trainer(
        max_steps=run.steps, accelerator="cpu", precision=precision, logger=logger,
        callbacks=[spectra, *progress_bar(run.steps)], enable_checkpointing=False, enable_progress_bar=is_alone(),
        enable_model_summary=False, limit_val_batches=0, log_every_n_steps=min(50, run.steps),
    )  # fmt: skip
    trainer.fit(module, datamodule=pairs)
    return spectra


def _log_theory(run: Run, log: SpectrumLogger) -> None:
    """Write the prediction as a TensorBoard run of its own, under the experiment's tags: one chart shows both."""
    times, _ = _measured(log)
    predicted = run.theory.embedding_eigenvalues(times)
    version = log.directory.name
    with SummaryWriter(str(log.directory.parents[1] / f"{log.directory.parent.name}_theory" / version)) as writer:
        for step, values, loss in zip(log.steps, predicted, run.theory.loss(times), strict=True):
            writer.add_scalar("train/loss", loss, step)
            for mode, value in enumerate(values):
                writer.add_scalar(f"spectrum/cross_correlation/eig_{mode:03d}", value, step)


def _measured(log: SpectrumLogger) -> tuple[Tensor, Tensor]:
    """Return times (T,) and eigenvalues of C (T, d) of a finished run."""
    return torch.tensor(log.times, dtype=torch.float64), torch.stack(log.eigenvalues["cross_correlation"])


def _compare(
    seed: int, small: Run, control: Run, logs: dict[str, SpectrumLogger]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Return the numbers that the claims are about, and a row per mode."""
    log, theory = logs[small.name], small.theory
    times, measured = _measured(log)
    steps = detect_steps(times, measured)
    predicted = small.predicted_steps
    learnable = int(predicted.isfinite().sum())
    crossed = crossing_times(times, measured, level=0.5)
    losses = [loss for loss in log.losses if not math.isnan(loss)]
    found = {
        "learnable": learnable,
        "learned": int(steps.num_learned[-1]),
        "distinct": steps.num_distinct,
        "error": float(((crossed - predicted) / predicted)[:learnable].abs().nan_to_num(nan=math.inf).max()),
        "deviation": float((measured - theory.embedding_eigenvalues(times)).abs().max()),
        "excess_loss": losses[-1] - (measured.shape[1] - learnable),
        "control": detect_steps(*_measured(logs[control.name])).num_distinct,
    }
    table = [
        {
            "seed": seed,
            "mode": mode + 1,
            "gamma": float(theory.eigenvalues[mode]),
            "measured_step_time": float(crossed[mode]),
            "predicted_step_time": float(predicted[mode]),
            "qr_step_time": float(theory.step_times[mode]),
            "qr_neighbours_too_close": bool(theory.neighbour_overlap[mode] > CLOSE_NEIGHBOURS),
        }
        for mode in range(measured.shape[1])
    ]
    return found, table


def _claims(found: list[dict[str, float]], options: argparse.Namespace) -> list[Claim]:
    """Judge the seed that is farthest off."""
    seeds = seeds_of(options)

    def worst(name: str, what: str, relation: str, bound: float) -> Claim:
        values = [row[name] for row in found]
        return Claim(name, f"{what}, {seeds}", (max if relation == "<=" else min)(values), relation, bound)

    learnable = max(row["learnable"] for row in found)
    return [
        worst("learned", "modes learned, of those with γ > 0; fewest", ">=", learnable),
        worst("distinct", "of them as distinct steps; fewest", ">=", math.ceil(learnable / 2)),
        worst("error", "largest relative error of a predicted step time (λ = ½)", "<=", 0.02),
        worst("deviation", "largest deviation of any eigenvalue at any logged step", "<=", 0.05),
        worst("excess_loss", "final loss above its theoretical minimum; most", "<=", 0.01),
        worst("control", "distinct steps from ordinary initialisation; most", "<=", 1),
    ]


def _trajectory(run: Run, log: SpectrumLogger, with_theory: bool) -> Trajectory:
    times, measured = _measured(log)
    count = detect_steps(times, measured).num_distinct
    trajectory = Trajectory(
        title=f"{run.name.replace('_init', ' initialisation')}: {count} distinct step{'s' * (count != 1)}",
        times=times.numpy(),
        losses=np.array(log.losses),
        eigenvalues=measured.numpy(),
    )
    if with_theory:  # the closed form is for small starts
        trajectory.theory_losses = run.theory.loss(times).numpy()
        trajectory.theory_eigenvalues = run.theory.embedding_eigenvalues(times).numpy()
        trajectory.step_times = run.predicted_steps.numpy()
    return trajectory


def _rows(run: Run, log: SpectrumLogger) -> list[list[Any]]:
    """Rows of ``data.csv``: theory (finite steps, uniform), its continuous-time limit, and the paper's QR form."""
    times, measured = _measured(log)
    predictions = [
        run.theory.embedding_eigenvalues(times), run.flow.embedding_eigenvalues(times),
        run.flow.embedding_eigenvalues(times, method="qr"),
    ]  # fmt: skip
    losses = [(1 - values).square().sum(1) for values in predictions]
    rows = []
    for t, (step, time_) in enumerate(zip(log.steps, log.times, strict=True)):
        head = [run.name, step, time_]
        rows.append([*head, "loss", "", log.losses[t], *(float(values[t]) for values in losses)])
        for mode in range(measured.shape[1]):
            values = [float(array[t, mode]) for array in (measured, *predictions)]
            rows.append([*head, "eigenvalue", mode, *values])
    return rows


if __name__ == "__main__":
    sys.exit(main())
