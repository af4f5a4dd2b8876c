"""A wide network learns the embedding that its tangent kernel predicts (kernel section and appendix of the paper).

A one-hidden-layer ReLU network is trained on pairs of random crops by full-batch gradient descent on the analytical
Barlow Twins loss. Before training, contrastive kernel PCA with the tangent kernel at initialisation predicts the final
embedding and the time at which each mode crosses ½. After training, the tangent kernel of the trained network gives a
second prediction. Both are compared with the embedding as subspaces, restricted to the modes that have crossed.

Published settings: width 2048, 50 images, one random crop per view, 7000 epochs, 10 dimensions, small initialisation.
Not stated in the paper, chosen here: 20×20 crops, the learning rate (from 4 × rate × γ_1), and the scaled weights.
*Lazy*: only the last layer × 1e-4; features hardly change. *Rich*: all weights × 0.2; features change.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from reproduce.claims import Claim, average, worst
from reproduce.controls import ordinary_kernel_pca, permuted_alignment
from reproduce.figure import Outcome, PaperFigure
from reproduce.options import data_name, fixed_pairs, limit_pairs
from reproduce.plots import alignment_figure
from reproduce.processes import map_parallel, step_progress
from reproduce.records import data_rows
from stepwise_lightning import MLP, BarlowTwins, FixedCropPairs, SpectrumLogger, SpectrumRecord, scale_last_layer
from stepwise_lightning.plots import Panel
from stepwise_lightning.spectrum import crossing_times, num_crossed
from stepwise_lightning.theory import ContrastiveKernelPCA, EmpiricalNTK, subspace_alignment

PAPER = (
    "Kernel section and appendix: subspace alignment of a trained wide network's embeddings with the closed form from "
    "its tangent kernel, at initialisation and after training, rises to nearly 1."
)
# least_initial depends on the profile: with few modes, ordinary kernel PCA is close to the closed form too.
# least_moved applies to the mean over seeds: rich networks have 0.028 to 0.063 for three seeds (0.011 or more for one),
# lazy networks 0.003 to 0.011.
PUBLISHED: dict[str, Any] = dict(
    num_pairs=50, crop_size=20, dim=10, width=2048, steps=7000, least_initial=0.95, least_moved=0.02
)
PROFILES: dict[str, dict[str, Any]] = {
    "smoke": dict(num_pairs=20, crop_size=6, dim=3, width=512, steps=1500, least_initial=0.995, least_moved=0.001),
    "cpu": PUBLISHED,
    "full": PUBLISHED | dict(data="cifar10"),
}
# 4 × learning rate × γ_1 at initialisation. In the rich variant γ_1 grows during training, by a factor of about 15.
RELATIVE_RATES = {"lazy": 0.25, "rich": 0.05}
LAST_LAYER, ALL_WEIGHTS = 1e-4, 0.2
ALIGNMENTS = (
    "tangent kernel at initialisation", "tangent kernel after training", "untrained network, with the latter",
    "images permuted (chance)",
)  # fmt: skip


@dataclass
class Result:
    """One trained network and the predictions of its tangent kernels."""

    variant: str
    seed: int
    learning_rate: float
    record: SpectrumRecord
    step_times: Tensor
    """Predicted, (d,)."""
    alignments: dict[str, np.ndarray[Any, Any]]
    """(T,) by name, in the order of ``ALIGNMENTS``; NaN before the first mode has crossed."""
    others: dict[str, float]
    """Final alignments with control theories."""

    @property
    def modes_crossed(self) -> int:
        """Number of modes that have crossed at the end."""
        return int(num_crossed(self.record.eigenvalues()[-1]))

    def summary(self) -> dict[str, Any]:
        """Return the row of the table."""
        crossed = crossing_times(self.record.times, self.record.eigenvalues())
        errors = ((self.step_times - crossed) / crossed)[: self.modes_crossed].abs()
        initial, final, untrained, permuted = (float(values[-1]) for values in self.alignments.values())
        return {
            "variant": self.variant,
            "seed": self.seed,
            "learning_rate": self.learning_rate,
            "modes_crossed": self.modes_crossed,
            "initial": initial,
            "final": final,
            "untrained": untrained,
            "permuted": permuted,
            **self.others,
            "largest_step_time_error": float(errors.max()) if self.modes_crossed else float("nan"),
        }

    def panel(self) -> Panel:
        """Return the panel; the record contains the prediction."""
        title = f"{self.variant}: {self.modes_crossed} modes crossed"
        return Panel(self.record, title=title, step_times=self.step_times)

    def rows(self) -> list[list[Any]]:
        """Return rows of ``data.csv``."""
        others = {f"alignment: {name}": torch.from_numpy(values) for name, values in self.alignments.items()}
        assert self.record.predicted is not None
        others["predicted_eigenvalue"] = self.record.predicted
        return data_rows([self.variant, self.seed], self.record, others=others)


def produce(options: argparse.Namespace, directory: Path) -> Outcome:
    """Train both variants for every seed, and compare."""
    limits = limit_pairs(options)
    runs = [(variant, seed, options, directory) for seed in options.seeds for variant in RELATIVE_RATES]
    fixed_pairs(options, options.seeds[0])  # raises for invalid data before any process starts
    results = map_parallel(experiment, runs, "kernel_mlp")
    first = [result for result in results if result.seed == options.seeds[0]]
    figure = alignment_figure(
        [result.panel() for result in first],
        [result.alignments for result in first],
        title="A wide network learns the embedding that its tangent kernel predicts",
        note=f"{options.num_pairs} pairs of {options.crop_size}×{options.crop_size} crops, {data_name(options.data)}; "
        f"width {options.width}; seed {options.seeds[0]}; alignments are restricted to the modes crossed so far",
    )
    summaries = [result.summary() for result in results]
    return Outcome(
        figure, ["variant", "seed", "step", "time", "quantity", "mode", "value"],
        (row for result in results for row in result.rows()), _claims(summaries, options), summaries,
        {"relative_rates": RELATIVE_RATES, "last_layer": LAST_LAYER, "all_weights": ALL_WEIGHTS} | limits,
    )  # fmt: skip


def experiment(variant: str, seed: int, options: argparse.Namespace, directory: Path) -> Result:
    """Predict, train, and compare the embeddings with both predictions."""
    pairs = fixed_pairs(options, seed, options.steps)
    encoder = MLP(3 * options.crop_size**2, [options.width], options.dim, seed=seed)
    if variant == "lazy":
        scale_last_layer(encoder, LAST_LAYER)
    else:
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.mul_(ALL_WEIGHTS)
    pairs.x1, pairs.x2 = project_to_span(encoder, pairs.x1, pairs.x2)
    # A copy keeps the kernel at initialisation; the control's kernel changes during training.
    before, following = (
        ContrastiveKernelPCA(EmpiricalNTK(network), options.dim).fit(pairs.x1, pairs.x2)
        for network in (copy.deepcopy(encoder), encoder)
    )
    rate = RELATIVE_RATES[variant] / (4 * float(before.eigenvalues_[0]))
    module = BarlowTwins(encoder, rate, off_diagonal_weight=1.0, normalize=False)
    with torch.no_grad():
        start = before.initial_singular_values(encoder(pairs.x1), encoder(pairs.x2))
    log = SpectrumLogger(
        matrices=["cross_correlation"], num_points=150, keep_embeddings=True,
        prediction=partial(before.embedding_eigenvalues, initial_singular_values=start),
    )  # fmt: skip
    _train(module, pairs, log, TensorBoardLogger(directory / "tensorboard", f"{variant}_seed{seed}"), options.steps)
    after = ContrastiveKernelPCA(EmpiricalNTK(encoder), options.dim).fit(pairs.x1, pairs.x2)
    alignments = _alignments(log.record, pairs, before, after)
    others = _others(log.record, pairs, before, after, following)
    return Result(variant, seed, rate, log.record, before.step_times(start), alignments, others)


@torch.no_grad()
def project_to_span(encoder: MLP, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    """Express the views, (n, …) each, and the first layer's weights in an orthonormal basis of the views' span.

    Gradient descent changes these weights only within the span. Outputs, tangent kernel and training are unchanged, at
    a fraction of the cost: 2n instead of 1200 inputs.

    Returns:
        Coordinates of both views, (n, r), where r is the smaller of 2n and the input dimension.

    """
    views = torch.cat([x1, x2]).flatten(1).double()
    basis = torch.linalg.qr(views.T).Q
    first = next(layer for layer in encoder if isinstance(layer, nn.Linear))
    first.weight = nn.Parameter((first.weight.double() @ basis).float())
    first.in_features = basis.shape[1]
    z1, z2 = (views @ basis).float().chunk(2)
    return z1, z2


def _train(module: BarlowTwins, pairs: FixedCropPairs, log: SpectrumLogger, logger: Any, steps: int) -> None:
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=logger, callbacks=[log, *step_progress("kernel_mlp", steps)],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        log_every_n_steps=50,
    )  # fmt: skip
    trainer.fit(module, datamodule=pairs)


def _alignments(
    record: SpectrumRecord, pairs: FixedCropPairs, before: ContrastiveKernelPCA, after: ContrastiveKernelPCA
) -> dict[str, np.ndarray[Any, Any]]:
    """Align the embeddings at each logged step with both predictions, and two controls with the second one."""
    crossed = num_crossed(record.eigenvalues()).tolist()
    embeddings = [record.embeddings(index).flatten(0, 1) for index in range(len(record))]
    initial, final = (torch.cat([kernel.transform(x) for x in (pairs.x1, pairs.x2)]) for kernel in (before, after))
    cases: list[tuple[list[Tensor], Tensor, Callable[..., Any]]] = [
        (embeddings, initial, subspace_alignment),
        (embeddings, final, subspace_alignment),
        ([embeddings[0]] * len(crossed), final, subspace_alignment),
        (embeddings, final, permuted_alignment),
    ]
    return {
        name: np.array([_alignment(f, g, k, measure) for f, k in zip(fs, crossed, strict=True)])
        for name, (fs, g, measure) in zip(ALIGNMENTS, cases, strict=True)
    }


def _others(
    record: SpectrumRecord,
    pairs: FixedCropPairs,
    before: ContrastiveKernelPCA,
    after: ContrastiveKernelPCA,
    following: ContrastiveKernelPCA,
) -> dict[str, float]:
    """Align the final embeddings with ordinary kernel PCA, wrong pairs, and a kernel that changed during training."""
    f, crossed = record.embeddings(-1).flatten(0, 1), int(num_crossed(record.eigenvalues()[-1]))
    z, dim = torch.cat([pairs.x1, pairs.x2]), before.n_components
    k = before.kernel(z, z)
    wrong = ContrastiveKernelPCA(after.kernel, dim).fit(pairs.x1, pairs.x2.roll(1, 0))
    forms = {
        "ordinary_initial": ordinary_kernel_pca(k, k, dim).flip(1),
        "wrong_pairs_final": wrong.transform(z),
        "following": following.transform(z),
    }
    return {name: _alignment(f, g, crossed) for name, g in forms.items()}


def _alignment(f: Tensor, g: Tensor, modes: int, measure: Callable[..., Any] = subspace_alignment) -> float:
    """Return the alignment of the first principal directions of f with the first modes of g; NaN for zero modes."""
    if not modes:
        return float("nan")
    directions = torch.linalg.svd(f.double(), full_matrices=False).U[:, :modes]
    return float(measure(directions, g[:, :modes]))


def _claims(summaries: list[dict[str, Any]], options: argparse.Namespace) -> list[Claim]:
    summaries = [
        summary
        | {
            # Over all modes; modes that have not crossed count 0.
            "initial_of_all": summary["initial"] * summary["modes_crossed"] / options.dim,
            "final_of_all": summary["final"] * summary["modes_crossed"] / options.dim,
            # Zero if the kernel at initialisation changed during training.
            "moved": summary["following"] - summary["initial"],
        }
        for summary in summaries
    ]
    lazy, rich = ([s for s in summaries if s["variant"] == variant] for variant in RELATIVE_RATES)
    seeds, time_error = options.seeds, "largest_step_time_error"

    def values(chosen: list[dict[str, Any]], key: str) -> list[float]:
        return [summary[key] for summary in chosen]

    return [
        worst(
            "lazy_initial", "lazy: alignment with the closed form of the kernel at initialisation",
            values(lazy, "initial_of_all"), ">=", options.least_initial, seeds, "ordinary kernel PCA",
            values(lazy, "ordinary_initial"),
        ),
        worst(
            "final", "lazy and rich: alignment with the closed form of the kernel after training",
            values(summaries, "final_of_all"), ">=", 0.98, seeds, "closed form of wrong pairs",
            values(summaries, "wrong_pairs_final"),
        ),
        average(
            "moved", "rich: alignment gain of the kernel after training over the kernel at initialisation",
            values(rich, "moved"), ">=", options.least_moved, seeds, "lazy network", values(lazy, "moved"),
        ),
        worst(
            "step_times", "lazy: largest relative error of a predicted step time", values(lazy, time_error), "<=", 0.2,
            seeds, "rich network", values(rich, time_error),
        ),
    ]  # fmt: skip


FIGURE = PaperFigure("kernel_mlp", __doc__, PAPER, PROFILES, produce)
