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
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from reproduce.common import Claim, data_name, quiet_lightning, report, write_outputs
from stepwise_lightning import BarlowTwins, FixedCropPairs, LinearEncoder, SpectrumLogger
from stepwise_lightning.plots import Trajectory, trajectories_figure
from stepwise_lightning.spectrum import crossing_times, detect_steps
from stepwise_lightning.theory import LinearBarlowTwins, feature_cross_correlation

# relative_rate is 4 × learning rate × γ_1: gradient descent is stable below 1, close to gradient flow below about 0.1.
PROFILES: dict[str, dict[str, Any]] = {
    "smoke": dict(num_pairs=64, crop_size=8, dim=4, init_std=1e-4, relative_rate=0.1, precision="32-true"),
    "cpu": dict(num_pairs=250, crop_size=20, dim=10, init_std=1e-4, relative_rate=0.1, precision="32-true"),
    "full": dict(num_pairs=500, crop_size=20, dim=10, init_std=1e-5, relative_rate=0.05, precision="64-true"),
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


def main(arguments: list[str] | None = None) -> int:
    """Run the experiment; return 0 if every claim holds, 1 if one fails, 2 for bad input."""
    options = _parser().parse_args(arguments)
    quiet_lightning()
    # The products are so small that a second thread gains little, and on a busy machine costs many times the step.
    torch.set_num_threads(1)
    started = time.perf_counter()
    for name, value in PROFILES[options.profile].items():
        if getattr(options, name, None) is None:
            setattr(options, name, value)
    try:
        pairs, small, control = _prepare(options)
        directory = Path(options.out) / "linear_model"
        directory.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    logs = {run.name: _train(run, pairs, options.precision, directory) for run in (small, control)}
    _log_theory(small, logs[small.name])
    claims, table = _claims(small, control, logs)
    figure = trajectories_figure(
        [_trajectory(run, logs[run.name], with_theory=run is small) for run in (small, control)],
        title="Linear Barlow Twins learns one eigenmode at a time",
        loss_label="loss  ‖C − I‖²",
        steps_label="predicted step",
        note=f"{options.num_pairs} pairs of {options.crop_size}×{options.crop_size} crops from "
        f"{data_name(options.data)}; seed {options.seed}",
    )
    columns = ["run", "step", "time", "quantity", "mode", "experiment", "theory", "theory_flow", "theory_qr"]
    rows = [row for run in (small, control) for row in _rows(run, logs[run.name])]
    settings = {k: v for k, v in vars(options).items() if k not in ("out", "seed", "data", "root", "download")}
    settings |= {f"{run.name}_learning_rate": run.learning_rate for run in (small, control)}
    settings |= {f"{run.name}_steps": run.steps for run in (small, control)}
    write_outputs(
        directory, figure, columns, rows, claims,
        name="linear_model", data_set=options.data, seed=options.seed, settings=settings, modes=table,
        seconds=round(time.perf_counter() - started, 1),
    )  # fmt: skip
    _print_table(table)
    return report(directory, claims)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="linear_model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", choices=PROFILES, default="cpu", help="size of the experiment (default: cpu)")
    parser.add_argument("--data", default="photos", help="photos, cifar10, or a folder of images (default: photos)")
    parser.add_argument("--out", default="results", help="folder for the outputs (default: results)")
    parser.add_argument("--seed", type=int, default=0, help="of pairs, crops and weights (default: 0)")
    parser.add_argument("--root", default="data", help="where cifar10 lies (default: data)")
    parser.add_argument("--download", action="store_true", help="fetch cifar10 if it is not there (170 MB)")
    group = parser.add_argument_group("settings that the profile chooses, unless given")
    group.add_argument("--num-pairs", type=int, help="n, number of images")
    group.add_argument("--crop-size", type=int, help="side of the crops, in pixels")
    group.add_argument("--dim", type=int, help="d, embedding dimension")
    group.add_argument("--init-std", type=float, help="standard deviation of the small initial weights")
    group.add_argument("--learning-rate", type=float, help="of the run from small initialisation")
    return parser


def _prepare(options: argparse.Namespace) -> tuple[FixedCropPairs, Run, Run]:
    """Load data, predict, and find every reason to refuse before anything is written."""
    pairs = FixedCropPairs(
        options.data, options.num_pairs, options.crop_size, options.seed, root=options.root, download=options.download
    )
    pairs.prepare_data()
    pairs.setup()
    gamma = feature_cross_correlation(pairs.x1, pairs.x2)
    top = float(torch.linalg.eigvalsh(gamma)[-1])
    rate = options.relative_rate / (4 * top) if options.learning_rate is None else options.learning_rate
    small = _plan("small_init", options.init_std, rate, gamma, options)
    control = _plan("ordinary_init", None, CONTROL_RELATIVE_RATE / (4 * top), gamma, options)
    return pairs, small, control


def _plan(name: str, init_std: float | None, rate: float, gamma: Tensor, options: argparse.Namespace) -> Run:
    encoder = LinearEncoder(len(gamma), options.dim, init_std, seed=options.seed)
    weights0 = encoder.weight.detach()
    theory = LinearBarlowTwins(gamma, weights0, learning_rate=rate)
    reached = theory.crossing_times(0.93)
    if not reached.isfinite().any():
        raise ValueError(f"no mode is ever learned from init_std {init_std}: it must be above 0, with γ_1 > 0")
    steps = math.ceil(float(reached[reached.isfinite()].max()) / rate)
    return Run(name, encoder, rate, steps, theory, LinearBarlowTwins(gamma, weights0), theory.crossing_times())


def _train(run: Run, pairs: FixedCropPairs, precision: Any, directory: Path) -> SpectrumLogger:
    """Train through Lightning; return the spectra."""
    pairs.hparams["steps_per_epoch"] = run.steps
    module = BarlowTwins(run.encoder, run.learning_rate, off_diagonal_weight=1.0, normalize=False)
    spectra = SpectrumLogger(matrices=["cross_correlation", "covariance"], num_points=300)
    logger = TensorBoardLogger(directory / "tensorboard", name=run.name, default_hp_metric=False)
    bar = TQDMProgressBar(refresh_rate=max(1, run.steps // 50))
    trainer = L.Trainer(
        max_steps=run.steps, accelerator="cpu", precision=precision, logger=logger, callbacks=[spectra, bar],
        enable_checkpointing=False, enable_model_summary=False, limit_val_batches=0,
        log_every_n_steps=min(50, run.steps),
    )  # fmt: skip
    print(f"training from {run.name}: {run.steps} steps")
    trainer.fit(module, datamodule=pairs)
    return spectra


def _log_theory(run: Run, log: SpectrumLogger) -> None:
    """Write the prediction as a TensorBoard run of its own, under the experiment's tags: one chart shows both."""
    times, _ = _measured(log)
    predicted = run.theory.embedding_eigenvalues(times)
    version = log.directory.name
    with SummaryWriter(str(log.directory.parents[1] / f"{run.name}_theory" / version)) as writer:
        for step, values, loss in zip(log.steps, predicted, run.theory.loss(times), strict=True):
            writer.add_scalar("train/loss", loss, step)
            for mode, value in enumerate(values):
                writer.add_scalar(f"spectrum/cross_correlation/eig_{mode:03d}", value, step)


def _measured(log: SpectrumLogger) -> tuple[Tensor, Tensor]:
    """Return times (T,) and eigenvalues of C (T, d) of a finished run."""
    return torch.tensor(log.times, dtype=torch.float64), torch.stack(log.eigenvalues["cross_correlation"])


def _claims(small: Run, control: Run, logs: dict[str, SpectrumLogger]) -> tuple[list[Claim], list[dict[str, Any]]]:
    log, theory = logs[small.name], small.theory
    times, measured = _measured(log)
    steps = detect_steps(times, measured)
    predicted = small.predicted_steps
    learnable = int(predicted.isfinite().sum())
    crossed = crossing_times(times, measured, level=0.5)
    error = float(((crossed - predicted) / predicted)[:learnable].abs().nan_to_num(nan=math.inf).max())
    deviation = float((measured - theory.embedding_eigenvalues(times)).abs().max())
    losses = [loss for loss in log.losses if not math.isnan(loss)]
    minimum = measured.shape[1] - learnable
    ordinary = detect_steps(*_measured(logs[control.name]))
    claims = [
        Claim("modes_learned", "modes learned, of those with γ > 0", int(steps.num_learned[-1]), ">=", learnable),
        Claim("distinct_steps", "of them as distinct steps", steps.num_distinct, ">=", math.ceil(learnable / 2)),
        Claim("step_times", "largest relative error of a predicted step time (λ = ½)", error, "<=", 0.02),
        Claim("trajectories", "largest deviation of any eigenvalue at any logged step", deviation, "<=", 0.05),
        Claim("final_loss", f"final loss above its theoretical minimum of {minimum}", losses[-1] - minimum, "<=", 0.01),
        Claim("control", "distinct steps from ordinary initialisation", ordinary.num_distinct, "<=", 1),
    ]
    table = [
        {
            "mode": mode + 1,
            "gamma": float(theory.eigenvalues[mode]),
            "measured_step_time": float(crossed[mode]),
            "predicted_step_time": float(predicted[mode]),
            "qr_step_time": float(theory.step_times[mode]),
            "qr_neighbours_too_close": bool(theory.neighbour_overlap[mode] > CLOSE_NEIGHBOURS),
        }
        for mode in range(measured.shape[1])
    ]
    return claims, table


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


def _print_table(table: list[dict[str, Any]]) -> None:
    print("\nmode       γ   step time λ = ½: measured   predicted   QR form (paper)")
    for row in table:
        mark = "  (neighbours too close)" if row["qr_neighbours_too_close"] else ""
        print(
            f"{row['mode']:4} {row['gamma']:9.4g} {row['measured_step_time']:24.4g} "
            f"{row['predicted_step_time']:11.4g} {row['qr_step_time']:15.4g}{mark}"
        )


if __name__ == "__main__":
    sys.exit(main())
