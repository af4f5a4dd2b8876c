"""A wide network follows its tangent kernel, not its last layer's kernel (kernel section and appendix of the paper).

A one-hidden-layer ReLU network is trained on pairs of random crops by full-batch gradient descent on the analytical
Barlow Twins loss. Its tangent kernel at initialisation predicts step times (closed form) and embeddings (the kernel
machine: gradient descent under the fixed kernel from the same start). Its rival is the kernel of the last layer alone,
which a network of random features would follow.

*Lazy*: weights ∝ width^(−1/4), the scale of the NTK parametrisation. The hidden layer's part of the tangent kernel is
as large as the last layer's, and the kernel changes less in wider networks. *Last layer only*: the same network with a
frozen hidden layer, for which the rival must be right. *Rich*: weights ∝ width^(−1/2), the mean-field scale. The kernel
changes at every width, and embeddings follow the final features.

Initial weights are symmetric: each hidden unit is repeated 2d times, and output o depends on two copies with opposite
signs. The output is exactly 0, and all outputs have the same tangent kernel with none between them, as the theory
assumes; with independent weights, kernels between outputs ∝ width^(−1/2) would start later modes early. Small random
weights of the last layer then add initial embeddings with root mean square 0.01.

Published settings: width 2048, 50 images, one random crop per view, 10 dimensions, small initialisation. Not stated in
the paper, chosen here: 20×20 crops, initial weights, the learning rate (from 4 × rate × γ_1) and the number of steps.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from reproduce.claims import Claim, average, worst
from reproduce.controls import kernel_matrix_pca
from reproduce.figure import Outcome, PaperFigure
from reproduce.kernel_plots import tangent_kernels_figure
from reproduce.options import data_name, fixed_pairs, limit_pairs
from reproduce.processes import map_parallel
from reproduce.records import data_rows
from reproduce.wide_networks import (
    KERNELS,
    VARIANTS,
    add_small_start,
    compare_machines,
    distance,
    kernel_machine,
    predicted_step_times,
    project_to_span,
    symmetric_mlp,
    tangent_kernels,
    train,
)
from stepwise_lightning import SpectrumRecord, scale_last_layer
from stepwise_lightning.plots import Panel
from stepwise_lightning.spectrum import cross_correlation_eigenvalues, crossing_times, num_crossed
from stepwise_lightning.theory import relu_ntk, subspace_alignment

PAPER = (
    "Kernel section and appendix: subspace alignment of a trained wide network's embeddings with the closed form from "
    "its tangent kernel, at initialisation and after training, rises to nearly 1."
)
# units: distinct hidden units; the width is 2 · dim · units.
PUBLISHED: dict[str, Any] = dict(
    num_pairs=50, crop_size=20, dim=10, units=(16, 32, 64, 128), time_error=0.05, least_moved=0.02
)
PROFILES: dict[str, dict[str, Any]] = {
    "smoke": dict(num_pairs=30, crop_size=12, dim=5, units=(16, 128), time_error=0.05, least_moved=0.001),
    "cpu": PUBLISHED,
    "full": PUBLISHED | dict(data="cifar10"),
}
START = 0.01  # root mean square of the initial embeddings
SMALL_LAST_LAYER = 1e-4  # scale of the last layer in a control, whose tangent kernel is the kernel of its last layer


@dataclass
class Result:
    """One trained network, and the predictions of its tangent kernels."""

    variant: str
    width: int
    seed: int
    record: SpectrumRecord
    eigenvalues: dict[str, Tensor]
    """Eigenvalues of C of the kernel machines, (T, d), by kernel at initialisation."""
    step_times: dict[str, Tensor]
    """Predicted step times, (d,), by kernel at initialisation."""
    alignments: dict[str, np.ndarray[Any, Any]]
    """With the closed forms, (T,), by kernel before and after training; NaN before the first mode has crossed."""
    numbers: dict[str, float]

    def step_ratios(self, kernel: str) -> Tensor:
        """Return predicted over measured step times, (d,); NaN for modes that have not crossed."""
        return self.step_times[kernel] / crossing_times(self.record.times, self.record.eigenvalues())

    def summary(self) -> dict[str, Any]:
        """Return the row of the table."""
        errors = {
            f"{kernel}_time_error": float(torch.nan_to_num(self.step_ratios(kernel) - 1, nan=np.inf).abs().mean())
            for kernel in KERNELS
        }
        final = {name: float(values[-1]) for name, values in self.alignments.items()}
        crossed = int(num_crossed(self.record.eigenvalues()[-1]))
        identity = {"variant": self.variant, "width": self.width, "seed": self.seed, "modes_crossed": crossed}
        return identity | self.numbers | errors | final

    def rows(self) -> list[list[Any]]:
        """Return rows of ``data.csv``."""
        others = {f"alignment: {name}": torch.from_numpy(values) for name, values in self.alignments.items()}
        others |= {f"eigenvalue: {name}": values for name, values in self.eigenvalues.items()}
        return data_rows([self.variant, self.width, self.seed], self.record, others=others)


def produce(options: argparse.Namespace, directory: Path) -> Outcome:
    """Train all variants for every seed, and compare."""
    limits = limit_pairs(options)
    wide, narrow = max(options.units), min(options.units)
    kinds = [("rich", wide), ("last layer only", wide), *(("lazy", units) for units in options.units), ("rich", narrow)]
    runs = [(*kind, seed, options, directory) for seed in options.seeds for kind in kinds]
    fixed_pairs(options, options.seeds[0])  # raises for invalid data before any process starts
    results = map_parallel(experiment, runs, "kernel_mlp")
    summaries = [result.summary() for result in results]
    widest = [result for result in results if result.width == 2 * options.dim * max(options.units)]
    first = {result.variant: result for result in widest if result.seed == options.seeds[0]}
    figure = tangent_kernels_figure(
        [Panel(first[variant].record, title=variant, step_times=()) for variant in VARIANTS],
        [{name: values.numpy() for name, values in first[variant].eigenvalues.items()} for variant in VARIANTS],
        [first[variant].alignments for variant in VARIANTS],
        {
            f"{variant}, {name}": _by_width(summaries, variant, f"{name}_drift")
            for variant in ("lazy", "rich")
            for name in KERNELS
        },
        {name: np.stack([r.step_ratios(name).numpy() for r in widest if r.variant == "lazy"]) for name in KERNELS},
        title="A wide network follows its tangent kernel, not the kernel of its last layer",
        note=f"{options.num_pairs} pairs of {options.crop_size}×{options.crop_size} crops, {data_name(options.data)}; "
        f"width {widest[0].width}, seed {options.seeds[0]}; alignments are restricted to the modes crossed so far",
    )
    return Outcome(
        figure, ["variant", "width", "seed", "step", "time", "quantity", "mode", "value"],
        (row for result in results for row in result.rows()), _claims(summaries, options), summaries,
        {"variants": {name: vars(variant) for name, variant in VARIANTS.items()}, "start": START} | limits,
    )  # fmt: skip


def experiment(variant: str, units: int, seed: int, options: argparse.Namespace, directory: Path) -> Result:
    """Predict, train, and compare the embeddings with the predictions of both kernels."""
    settings, pairs, dim = VARIANTS[variant], fixed_pairs(options, seed, 10**6), options.dim
    width = 2 * dim * units
    scale = settings.factor * width**-settings.exponent
    encoder = symmetric_mlp(3 * options.crop_size**2, units, dim, scale, seed)
    pairs.x1, pairs.x2 = project_to_span(encoder, pairs.x1, pairs.x2)
    length = torch.cat([pairs.x1, pairs.x2]).square().sum(1).mean().sqrt()
    pairs.x1, pairs.x2 = pairs.x1 / length, pairs.x2 / length
    z = torch.cat([pairs.x1, pairs.x2])
    add_small_start(encoder, z, START, seed)
    f0 = encoder(z).detach().double()
    before = tangent_kernels(encoder, z)
    small = tangent_kernels(scale_last_layer(copy.deepcopy(encoder), SMALL_LAST_LAYER), z)
    forms = {name: kernel_matrix_pca(kernel, dim) for name, kernel in before.items()}
    rate = settings.relative_rate / (4 * float(forms[settings.trained][0].eigenvalues_[0]))
    step_times = {name: predicted_step_times(machine, f0, rate) for name, (machine, _) in forms.items()}
    steps = int(settings.duration * float(step_times[settings.trained].max()) / rate)
    encoder[1].requires_grad_(settings.trained == "full")
    name = f"{variant.replace(' ', '_')}_{width}_seed{seed}"
    record = train(encoder, rate, pairs, steps, TensorBoardLogger(directory / "tensorboard", name))
    after = tangent_kernels(encoder, z)
    machines = {name: kernel_machine(kernel, f0, rate, record.steps.tolist()) for name, kernel in before.items()}
    embeddings = {f"{name}, initial": embedding for name, (_, embedding) in forms.items()}
    embeddings |= {f"{name}, final": kernel_matrix_pca(kernel, dim)[1] for name, kernel in after.items()}
    infinite = scale**2 * width / 2 * relu_ntk(z, z)
    numbers = {
        "hidden_share": distance(before["last"], before["full"]),
        "hidden_share_small": distance(small["last"], small["full"]),
        **{f"{name}_to_infinite": distance(kernel, infinite) for name, kernel in before.items()},
        **{f"{name}_drift": distance(after[name], kernel) for name, kernel in before.items()},
    }
    numbers |= compare_machines(record.embeddings(-1).flatten(0, 1).double(), machines, after["full"])
    eigenvalues = {
        name: torch.stack([cross_correlation_eigenvalues(*f.chunk(2)) for f in machine])
        for name, machine in machines.items()
    }
    return Result(variant, width, seed, record, eigenvalues, step_times, _alignments(record, embeddings), numbers)


def _alignments(record: SpectrumRecord, forms: dict[str, Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    """Align the first principal directions of the embeddings at each logged step with the modes that have crossed."""
    aligned = np.full((len(forms), len(record)), np.nan)
    for index, modes in enumerate(num_crossed(record.eigenvalues()).tolist()):
        if modes:
            f = record.embeddings(index).flatten(0, 1).double()
            directions = torch.linalg.svd(f, full_matrices=False).U[:, :modes]
            aligned[:, index] = [float(subspace_alignment(directions, g[:, :modes])) for g in forms.values()]
    return dict(zip(forms, aligned, strict=True))


def _by_width(summaries: list[dict[str, Any]], variant: str, key: str) -> dict[int, list[float]]:
    """Return the numbers of all seeds by width, narrow networks first."""
    chosen = sorted((s for s in summaries if s["variant"] == variant), key=lambda s: (s["width"], s["seed"]))
    numbers: dict[int, list[float]] = {}
    for summary in chosen:
        numbers.setdefault(summary["width"], []).append(summary[key])
    return numbers


def _exponents(summaries: list[dict[str, Any]], variant: str) -> list[float]:
    """Return the exponent p of the change of the last layer's kernel ∝ width^p for each seed, by least squares."""
    changes = _by_width(summaries, variant, "last_drift")
    widths, floor = np.log(list(changes)), np.finfo(float).eps  # a kernel without change has no exponent: 0
    drifts = zip(*changes.values(), strict=True)
    return [float(np.polyfit(widths, np.log(np.maximum(of_seed, floor)), 1)[0]) for of_seed in drifts]


_NAMES = "the tangent kernel", "the last layer's kernel"


def _claims(summaries: list[dict[str, Any]], options: argparse.Namespace) -> list[Claim]:
    widest = 2 * options.dim * max(options.units)

    def values(variant: str, key: str, minus: str = "") -> list[float]:
        chosen = [s for s in summaries if (s["variant"], s["width"]) == (variant, widest)]
        return [s[key] - (s[minus] if minus else 0.0) for s in chosen]

    exponents = [_exponents(summaries, variant) for variant in ("lazy", "rich")]
    return [*_kernel_claims(values, exponents, options.seeds), *_network_claims(values, options)]


def _kernel_claims(values: Callable[..., list[float]], exponents: list[list[float]], seeds: list[int]) -> list[Claim]:
    """Return the claims about the tangent kernel itself."""
    full, last = _NAMES
    return [
        worst(
            "hidden_share", f"lazy: distance of {last} from {full}, relative", values("lazy", "hidden_share"), ">=",
            0.3, seeds, f"last layer × {SMALL_LAST_LAYER:g}", values("lazy", "hidden_share_small"),
        ),
        worst(
            "infinite_width", f"lazy: distance of {full} from the kernel of infinite width, relative",
            values("lazy", "full_to_infinite"), "<=", 0.25, seeds, last, values("lazy", "last_to_infinite"),
        ),
        worst(
            "drift", f"lazy: relative change of {full} during training", values("lazy", "full_drift"), "<=", 0.03,
            seeds, "rich network", values("rich", "full_drift"),
        ),
        worst(
            "drift_exponent", f"lazy: exponent of the change of {last} with the width", exponents[0], "<=", -0.5, seeds,
            "rich network", exponents[1],
        ),
    ]  # fmt: skip


def _network_claims(values: Callable[..., list[float]], options: argparse.Namespace) -> list[Claim]:
    """Return the claims about embeddings and step times."""
    (full, last), seeds = _NAMES, options.seeds
    return [
        worst(
            "step_times", f"lazy: mean relative error of the step times predicted from {full}",
            values("lazy", "full_time_error"), "<=", options.time_error, seeds, last, values("lazy", "last_time_error"),
        ),
        worst(
            "embedding", f"lazy: alignment of the final embeddings with the kernel machine of {full}",
            values("lazy", "full_machine"), ">=", 0.99, seeds, f"kernel machine of {last}",
            values("lazy", "last_machine"),
        ),
        worst(
            "scale", f"lazy: relative error of the final embeddings of the kernel machine of {full}",
            values("lazy", "full_embedding_error"), "<=", 0.15, seeds, f"kernel machine of {last}",
            values("lazy", "last_embedding_error"),
        ),
        worst(
            "full_over_last", f"lazy: alignment with the kernel machine of {full} minus {last}",
            values("lazy", "full_machine", "last_machine"), ">=", 0.01, seeds, "network whose last layer alone trains",
            values("last layer only", "full_machine", "last_machine"),
        ),
        worst(
            "final", f"rich: alignment with the closed form of {full} after training", values("rich", "full, final"),
            ">=", 0.98, seeds, "closed form of wrong pairs", values("rich", "wrong_pairs_final"),
        ),
        average(
            "moved", "rich: gain in alignment of the closed form after training over the one at initialisation",
            values("rich", "full, final", "full, initial"), ">=", options.least_moved, seeds, "lazy network",
            values("lazy", "full, final", "full, initial"),
        ),
        worst(
            "rich_features", f"rich: alignment with the closed form of {last} minus {full}, after training",
            values("rich", "last, final", "full, final"), ">=", 0.0, seeds, "lazy network",
            values("lazy", "last, final", "full, final"),
        ),
    ]  # fmt: skip


FIGURE = PaperFigure("kernel_mlp", __doc__, PAPER, PROFILES, produce)
