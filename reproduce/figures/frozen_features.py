"""With frozen features, theory predicts the learning of a ResNet's last layer (a control for Fig. 1 C-D).

In ``resnet_barlow_twins`` modes are learned later than the theory of the last layer predicts, and eigenvalues
fluctuate. This figure trains only the last layer, with the same initial weights, on the initial features of the
held-out pairs with full batches. The theory must then hold within a few per cent. Remaining deviations in the full
network are caused by changing features and by batches.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from reproduce.claims import Claim, worst
from reproduce.figure import Outcome, PaperFigure
from reproduce.networks.runs import Run, trained_runs
from reproduce.networks.training import PROFILES
from reproduce.options import data_name
from reproduce.processes import map_parallel
from reproduce.records import data_rows, theory_record
from stepwise_lightning import BarlowTwins, FixedCropPairs, LinearEncoder, SpectrumLogger, SpectrumRecord
from stepwise_lightning.plots import Panel, trajectories_figure
from stepwise_lightning.spectrum import crossing_times, num_crossed
from stepwise_lightning.theory import LinearBarlowTwins, feature_cross_correlation

PAPER = "Not in the paper: a control for its Fig. 1 C-D."
MAX_RELATIVE_RATE = 0.25  # 4 × learning rate × γ_1


@dataclass
class Result:
    """A last layer trained on frozen features."""

    run: Run
    record: SpectrumRecord
    theory: SpectrumRecord
    one_view: SpectrumRecord
    """Theory for identical views."""

    def summary(self) -> dict[str, Any]:
        """Return the row of the table."""
        scale = _rate_without_momentum(self.run) / self.run.optimization()[0]
        frozen = _time_error(self.record.times, self.record.eigenvalues(), self.theory)
        moving = _time_error(scale * self.run.record.times, self.run.eigenvalues(), self.theory)
        deviation, deviation_one_view = (
            float((self.record.eigenvalues() - theory.eigenvalues()).abs().max())
            for theory in (self.theory, self.one_view)
        )
        return {
            "seed": self.run.seed,
            "modes_crossed": int(num_crossed(self.record.eigenvalues()[-1])),
            "time_error": frozen,
            "time_error_moving": moving,
            "deviation": deviation,
            "deviation_one_view": deviation_one_view,
        }


def _rate_without_momentum(run: Run) -> float:
    """Return the learning rate that gives about the same speed without momentum."""
    rate, momentum = run.optimization()
    return rate / (1 - momentum)


def _time_error(times: Tensor, eigenvalues: Tensor, theory: SpectrumRecord) -> float:
    """Return the largest relative error of a predicted crossing time (λ = ½) of the modes that cross."""
    measured, predicted = crossing_times(times, eigenvalues), crossing_times(theory.times, theory.eigenvalues())
    errors = (predicted / measured - 1).abs()
    return float(errors[errors.isfinite()].max()) if errors.isfinite().any() else float("nan")


def produce(options: argparse.Namespace, directory: Path) -> Outcome:
    """Train missing networks, then the last layer on frozen features, for every seed."""
    runs = trained_runs(options, [("barlow_twins", "small")])
    results = map_parallel(experiment, [(run, directory) for run in runs], "frozen_features")
    first = results[0]
    figure = trajectories_figure(
        [
            Panel(first.record, title="frozen features", theory=first.theory),
            Panel(first.run.record, "cross_correlation", "trained features", first.theory),
        ],
        title="Theory holds for frozen features",
        note=f"last layer of a ResNet, {data_name(options.data)}, seed {options.seeds[0]}; dashed: theory",
        steps_label="detected step",
    )
    return Outcome(
        figure, ["seed", "step", "time", "quantity", "mode", "experiment", "theory"],
        (row for r in results for row in data_rows([r.run.seed], r.record, theories=[r.theory])),
        _claims([result.summary() for result in results], options), [result.summary() for result in results],
    )  # fmt: skip


def experiment(run: Run, directory: Path) -> Result:
    """Train the last layer of a run on its initial features, without momentum, for the same duration."""
    h1, h2, weights = run.initial_features()
    # As fast as the network, up to the rate at which a full batch follows the theory closely.
    gamma = float(torch.linalg.eigvalsh(feature_cross_correlation(h1, h2)).max())
    rate = min(_rate_without_momentum(run), MAX_RELATIVE_RATE / (4 * gamma))
    steps = round(int(run.record.steps[-1]) * _rate_without_momentum(run) / rate)
    encoder = LinearEncoder(h1.shape[1], len(weights))
    with torch.no_grad():
        encoder.weight.copy_(weights)
    pairs = FixedCropPairs(steps_per_epoch=steps)
    pairs.x1, pairs.x2 = h1.float(), h2.float()
    log = SpectrumLogger(matrices=["cross_correlation"], center=True, num_points=150)
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", callbacks=[log], enable_checkpointing=False, enable_progress_bar=False,
        logger=TensorBoardLogger(directory / "tensorboard", f"seed{run.seed}"), enable_model_summary=False,
        limit_val_batches=0, log_every_n_steps=50,
    )  # fmt: skip
    trainer.fit(BarlowTwins(encoder, rate, off_diagonal_weight=1.0, normalize=False, center=True), datamodule=pairs)
    theories = [LinearBarlowTwins(feature_cross_correlation(h1, view), weights, rate) for view in (h2, h1)]
    predicted = [theory_record(log.record, theory.embedding_eigenvalues(log.record.times)) for theory in theories]
    return Result(run, log.record, *predicted)


def _claims(summaries: list[dict[str, Any]], options: argparse.Namespace) -> list[Claim]:
    def values(key: str) -> list[float]:
        return [summary[key] for summary in summaries]

    return [
        worst(
            "times", "largest relative error of a predicted crossing time (λ = ½)", values("time_error"), "<=", 0.03,
            options.seeds, "trained features", values("time_error_moving"),
        ),
        worst(
            "deviation", "largest deviation of an eigenvalue at any logged step", values("deviation"), "<=", 0.05,
            options.seeds, "Γ of one view", values("deviation_one_view"),
        ),
    ]  # fmt: skip


FIGURE = PaperFigure("frozen_features", __doc__, PAPER, PROFILES, produce)
