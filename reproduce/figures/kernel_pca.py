"""Kernel machines converge to the closed-form embedding, also on held-out images (kernel section of the paper).

Kernel machines with an RBF kernel and a ReLU tangent kernel are trained by kernel gradient descent on the analytical
Barlow Twins loss, on pairs of random crops, from small random functions. Contrastive kernel PCA gives the final
embedding in closed form. Both are compared as subspaces, on the training crops and on crops of other images. The images
show the held-out crops with the smallest and largest values of each eigenfunction.

The paper has no such figure; data, kernels and sizes are chosen here. Initial functions of scale α leave a fraction
α^{1 − γ_{d+1}/γ_d} of mode d + 1 in the embedding, which is large for nearly equal eigenvalues. The initial functions
are therefore very small, and the dimension, at most five, ends at a gap of the eigenvalues.

The control is ordinary kernel PCA of the same images, which ignores the pairs. For the RBF kernel on photographs it is
nearly equal to the closed form, and the control is the closed form of wrong pairs.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reproduce.claims import Claim, worst
from reproduce.controls import ordinary_kernel_pca, permuted_alignment
from reproduce.figure import Outcome, PaperFigure
from reproduce.options import data_name, limit_pairs
from reproduce.plots import eigenfunctions_figure
from reproduce.processes import Progress, is_main_process, map_parallel
from reproduce.records import data_rows, theory_record, write_events
from stepwise_lightning import SpectrumRecord
from stepwise_lightning.data import crop_pairs, download_images, load_images
from stepwise_lightning.plots import Panel
from stepwise_lightning.spectrum import crossing_times, num_crossed
from stepwise_lightning.spectrum.measures import cross_correlation_eigenvalues
from stepwise_lightning.spectrum.schedule import log_spaced_steps
from stepwise_lightning.theory import ContrastiveKernelPCA, LinearBarlowTwins, rbf_kernel, relu_ntk, subspace_alignment

PAPER = (
    "Kernel section: kernelised Barlow Twins converges to the closed-form embedding given by the top modes of a "
    "contrastive kernel. The paper derives this result without a figure."
)
PROFILES: dict[str, dict[str, Any]] = {
    "smoke": dict(num_pairs=60, held_out=40, crop_size=8, dim=4),
    "cpu": dict(num_pairs=500, held_out=200, crop_size=20, dim=5),
    "full": dict(num_pairs=2000, held_out=500, crop_size=20, dim=5, data="cifar10"),
}
ALPHA = 1e-20  # scale of the initial functions
# Maximum γ_{d+1}/γ_d at a gap: 1e-20 to the power 2 (1 − 0.9) leaves 1e-4 of the next mode's variance.
GAP = 0.9
RELATIVE_RATE = 0.1  # 4 × learning rate × γ_1
KERNELS = ("RBF", "ReLU tangent kernel")
# Control of each kernel: a closed form that must not align with the trained machine.
CONTROLS = dict(zip(KERNELS, ("wrong_pairs", "ordinary"), strict=True))
MIN_ALIGNMENT = 0.999
# Duration of training, in units of the last mode's predicted step time.
DURATION = 1.5


@dataclass
class Result:
    """One trained machine and its closed form."""

    kernel: str
    seed: int
    machine: ContrastiveKernelPCA
    record: SpectrumRecord
    theory: SpectrumRecord
    start: Tensor
    """Initial singular values, (d,)."""
    step_times: Tensor
    """Predicted, (d,)."""
    alignments: dict[str, float]
    """Alignments with closed forms on training and held-out crops."""

    def summary(self) -> dict[str, Any]:
        """Return the row of the table."""
        eigenvalues = self.record.eigenvalues()
        crossed = crossing_times(self.record.times, eigenvalues)
        flow = self.machine.step_times(self.start)
        return {
            "kernel": self.kernel,
            "seed": self.seed,
            "modes": len(self.step_times),
            "modes_crossed": int(num_crossed(eigenvalues[-1])),
            **self.alignments,
            "largest_step_time_error": float(((self.step_times - crossed) / crossed).abs().max()),
            "without_finite_steps": float(((flow - crossed) / crossed).abs().max()),
        }

    def panel(self) -> Panel:
        """Return the panel."""
        aligned, ordinary = (self.alignments[f"{form}_held_out"] for form in ("alignment", "ordinary"))
        title = f"{self.kernel}: held-out alignment {aligned:.4f}\n(with ordinary kernel PCA {ordinary:.4f})"
        return Panel(self.record, title=title, theory=self.theory, step_times=self.step_times)


def produce(options: argparse.Namespace, directory: Path) -> Outcome:
    """Train both machines for every seed, and compare."""
    if options.download:
        download_images(options.data, options.root)
    limits = limit_pairs(options)
    draws = {seed: _draw(seed, options) for seed in options.seeds}
    items = [(name, seed, options) for seed in options.seeds for name in KERNELS]
    results = map_parallel(experiment, items, "kernel_pca")
    for result in results:
        folder = directory / "tensorboard" / f"{_key(result.kernel)}_seed{result.seed}"
        write_events(folder, result.record)
        write_events(folder.with_name(f"{folder.name}_theory"), result.theory)
    first = results[: len(KERNELS)]
    crops = draws[options.seeds[0]][0][options.num_pairs :]
    figure = eigenfunctions_figure(
        [result.panel() for result in first],
        [_extremes(result.machine, crops) for result in first],
        title="Kernel machines converge to the closed form; its modes are patterns in the images",
        note=f"{options.num_pairs} pairs of {options.crop_size}×{options.crop_size} crops, {data_name(options.data)}; "
        f"seed {options.seeds[0]}; held-out crops",
    )
    return Outcome(
        figure, ["kernel", "seed", "step", "time", "quantity", "mode", "experiment", "theory"],
        (row for r in results for row in data_rows([r.kernel, r.seed], r.record, theories=[r.theory])),
        _claims(results, options.seeds), [result.summary() for result in results],
        {"alpha": ALPHA, "relative_rate": RELATIVE_RATE} | limits,
    )  # fmt: skip


def _draw(seed: int, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    images = load_images(options.data, options.root)
    return crop_pairs(images, options.num_pairs + options.held_out, options.crop_size, seed)


def _kernel(name: str, crop_size: int) -> Any:
    # The length scale is about the median distance between two crops.
    return partial(rbf_kernel, length_scale=0.6 * (3 * crop_size**2) ** 0.5) if name == "RBF" else relu_ntk


def _key(kernel: str) -> str:
    return kernel.split()[0].lower()


def experiment(name: str, seed: int, options: argparse.Namespace) -> Result:
    """Fit the closed form, train the machine, and compare both."""
    n, kernel, views = options.num_pairs, _kernel(name, options.crop_size), _draw(seed, options)
    x1, x2 = (view[:n] for view in views)
    machine = fit_above_gap(kernel, options.dim, x1, x2)
    z, held_out = torch.cat([x1, x2]), torch.cat([view[n:] for view in views])
    k = kernel(z, z)
    generator = torch.Generator().manual_seed(seed)
    a = ALPHA * torch.randn(machine.n_components, 2 * n, dtype=torch.float64, generator=generator)
    # The loss is invariant to the basis of the embedding. In this basis no function contains the modes of the previous
    # ones; in others float64 loses late modes to round-off next to learned ones, and they are up to 9 % late.
    a = torch.linalg.qr(a @ k @ machine.coefficients_).Q.T @ a
    f = a @ k
    start = machine.initial_singular_values(f[:, :n].T, f[:, n:].T)
    rate = RELATIVE_RATE / (4 * float(machine.eigenvalues_[0]))
    # In the basis of its eigenfunctions the machine is a linear model. This theory includes the finite learning rate.
    theory = LinearBarlowTwins(torch.diag(machine.eigenvalues_), torch.diag(start), learning_rate=rate)
    step_times = theory.step_times
    steps = int(DURATION * float(step_times.max()) / rate)
    a, record = _train(a, k, rate, steps, f"kernel_pca, {name}, seed {seed}")
    wrong = ContrastiveKernelPCA(kernel, machine.n_components).fit(x1, x2.roll(1, 0))
    alignments: dict[str, float] = {}
    for points, x, rows in (("training", z, k), ("held_out", held_out, kernel(held_out, z))):
        f = rows @ a.T
        forms = {
            "alignment": machine.transform(x),
            "ordinary": ordinary_kernel_pca(k, rows, machine.n_components),
            "wrong_pairs": wrong.transform(x),
        }
        alignments |= {f"{form}_{points}": float(subspace_alignment(f, g)) for form, g in forms.items()}
        alignments[f"permuted_{points}"] = permuted_alignment(f, forms["alignment"])
    predicted = theory_record(record, theory.embedding_eigenvalues(record.times))
    return Result(name, seed, machine, record, predicted, start, step_times, alignments)


def fit_above_gap(kernel: Any, max_modes: int, x1: Tensor, x2: Tensor) -> ContrastiveKernelPCA:
    """Fit the modes above the last gap within ``max_modes``, or above the widest gap if all ratios exceed GAP."""
    gamma = ContrastiveKernelPCA(kernel, max_modes + 1).fit(x1, x2).eigenvalues_
    ratios = gamma[1:] / gamma[:-1]
    gaps = (ratios <= GAP).nonzero().flatten().tolist() or [int(ratios.argmin())]
    return ContrastiveKernelPCA(kernel, gaps[-1] + 1).fit(x1, x2)


def _train(a: Tensor, k: Tensor, rate: float, steps: int, title: str) -> tuple[Tensor, SpectrumRecord]:
    """Train by gradient descent in the kernel's Hilbert space: A ← A − 4η (C − I) A K̃ P / 2n for f(x) = A K(Z, x).

    Args:
        a: initial A, (d, 2n).
        k: K(Z, Z), (2n, 2n), first views before second views.
        rate: η.
        steps: number of the last measured step.
        title: title of the progress display.

    Returns:
        A after one more step, and the record.

    """
    n, f = len(k) // 2, a @ k
    measured_steps, eigenvalues = set(log_spaced_steps(steps, 200)), {}
    progress = Progress(title, steps + 1, "steps") if is_main_process() else None
    for step in range(steps + 1):
        if step in measured_steps:
            eigenvalues[step] = cross_correlation_eigenvalues(f[:, :n].T, f[:, n:].T)
        swapped = f.roll(n, 1)
        c = f @ swapped.T / (2 * n)
        a = a - 4 * rate * (c - torch.eye(len(a))) @ swapped / (2 * n)
        f = a @ k
        if progress is not None:
            progress.update()
    if progress is not None:
        progress.close()
    values, done = torch.stack(list(eigenvalues.values())), torch.tensor(list(eigenvalues))
    return a, SpectrumRecord.of(rate * done.double(), values, (1 - values).square().sum(1), steps=done)


def _claims(results: list[Result], seeds: list[int]) -> list[Claim]:
    claims = []
    for name, control in CONTROLS.items():
        summaries = [result.summary() for result in results if result.kernel == name]
        other = {"ordinary": "ordinary kernel PCA", "wrong_pairs": "closed form of wrong pairs"}[control]
        for points in ("training", "held_out"):
            aligned, others = ([s[f"{form}_{points}"] for s in summaries] for form in ("alignment", control))
            sentence = f"{name}: alignment with the closed form on {points.replace('_', '-')} crops"
            key = f"{_key(name)}_{points}"
            claims.append(worst(key, sentence, aligned, ">=", MIN_ALIGNMENT, seeds, other, others))
        errors, of_flow = ([s[key] for s in summaries] for key in ("largest_step_time_error", "without_finite_steps"))
        sentence = f"{name}: largest relative error of a predicted step time"
        claims.append(
            worst(f"{_key(name)}_step_times", sentence, errors, "<=", 0.01, seeds, "theory of gradient flow", of_flow)
        )
    return claims


def _extremes(machine: ContrastiveKernelPCA, crops: Tensor, modes: int = 5, count: int = 5) -> list[Any]:
    """Return the crops with the lowest and highest values of each mode, (2·count, h, w, 3), in [0, 1]."""
    values = machine.transform(crops)[:, :modes]
    low, high = crops.amin((0, 2, 3)), crops.amax((0, 2, 3))
    shown = ((crops - low[:, None, None]) / (high - low)[:, None, None]).permute(0, 2, 3, 1).numpy()
    order = values.argsort(0)
    return [shown[torch.cat([mode[:count], mode[-count:]]).numpy()] for mode in order.T]


FIGURE = PaperFigure("kernel_pca", __doc__, PAPER, PROFILES, produce)
