"""Kernel machines follow the closed form during and after training, also on held-out images (kernel section).

Kernel machines with an RBF kernel and a ReLU tangent kernel are trained by kernel gradient descent on the analytical
Barlow Twins loss, on pairs of random crops. Contrastive kernel PCA gives the embedding in closed form. The images show
the held-out crops with the smallest and largest values of each eigenfunction.

From small random functions, the final embedding on held-out crops is compared as a subspace. Function i keeps a part of
each mode j > i, because it stops growing when its own mode is learned: its coefficients are
R_ij (s_i(t)/s_i(0))^{γ_j/γ_i}, with R of the QR decomposition of the start and the paper's s_i(t) (ours). The limit of
small starts omits these parts, which are large for nearly equal γ. The final functions have the smallest norm of all
global minima of the loss.

From functions aligned with the eigenfunctions, the closed form holds at every time, and the values of the embedding on
held-out crops are compared up to one rotation. The contrastive kernel maps the final functions to multiples of
themselves.

The paper has no such figure; data, kernels and sizes are chosen here. The control is ordinary kernel PCA of the same
images, which ignores the pairs.
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
from reproduce.controls import permuted_alignment, procrustes_error
from reproduce.figure import Outcome, PaperFigure
from reproduce.kernel_machines import correlation, excess_norm, next_step, train, without_pairs
from reproduce.options import data_name, limit_pairs
from reproduce.plots import eigenfunctions_figure
from reproduce.processes import map_parallel
from reproduce.records import data_rows, theory_record, write_events
from stepwise_lightning import SpectrumRecord
from stepwise_lightning.data import crop_pairs, download_images, load_images
from stepwise_lightning.plots import Panel
from stepwise_lightning.spectrum import crossing_times, num_crossed
from stepwise_lightning.spectrum.schedule import log_spaced_steps
from stepwise_lightning.theory import (
    ContrastiveKernelPCA,
    LinearBarlowTwins,
    rbf_kernel,
    relu_ntk,
    subspace_alignment,
)

PAPER = (
    "Kernel section: kernelised Barlow Twins converges to the closed-form embedding given by the top modes of a "
    "contrastive kernel. The paper derives this result without a figure."
)
PROFILES: dict[str, dict[str, Any]] = {
    "smoke": dict(num_pairs=60, held_out=40, crop_size=8, dim=4),
    "cpu": dict(num_pairs=500, held_out=200, crop_size=20, dim=5),
    "full": dict(num_pairs=2000, held_out=500, crop_size=20, dim=5, data="cifar10"),
}
ALPHA = 1e-12  # scale of the small initial functions
EXTRA_MODES = 5  # parts of these are included in the closed form
RELATIVE_RATE = 0.1  # 4 × learning rate × γ_1
# Aligned start: the same, at which gradient flow errs by about 0.01, and initial eigenvalues of C.
ALIGNED_RELATIVE_RATE, ALIGNED_EIGENVALUE = 0.02, 0.01
KERNELS = ("RBF", "ReLU tangent kernel")
# Ordinary kernel PCA reaches 0.9997 and 0.993, photographs, seeds 0 to 2.
MIN_ALIGNMENT = dict(zip(KERNELS, (0.9999, 0.999), strict=True))
# Parts of mode d + 1 add up to 0.0004 for the ReLU kernel (photographs, seeds 0 to 2).
MAX_NORM = dict(zip(KERNELS, (0.0005, 0.005), strict=True))
# Duration of training, in units of the last mode's predicted step time.
DURATION = 1.5
NUM_TIMES = 12  # at which values of the embedding are compared


@dataclass
class Result:
    """Machines of one kernel and seed, trained from a small and from an aligned start, and their closed form."""

    kernel: str
    seed: int
    machine: ContrastiveKernelPCA
    record: SpectrumRecord
    theory: SpectrumRecord
    step_times: Tensor
    """Predicted times at which eigenvalues cross ½, (d,)."""
    flow_times: Tensor
    """The same for gradient flow."""
    numbers: dict[str, float]
    """Comparisons, those of a control with the suffix ``_control``."""

    def summary(self) -> dict[str, Any]:
        """Return the row of the table."""
        eigenvalues = self.record.eigenvalues()
        crossed = crossing_times(self.record.times, eigenvalues)
        return {
            "kernel": self.kernel,
            "seed": self.seed,
            "modes": len(self.step_times),
            "modes_crossed": int(num_crossed(eigenvalues[-1])),
            **self.numbers,
            "step_times": float(((self.step_times - crossed) / crossed).abs().max()),
            "step_times_control": float(((self.flow_times - crossed) / crossed).abs().max()),
        }

    def panel(self) -> Panel:
        """Return the panel."""
        aligned, ordinary = (self.numbers[f"held_out{suffix}"] for suffix in ("", "_control"))
        title = f"{self.kernel}: held-out alignment {aligned:.5f}\n(with ordinary kernel PCA {ordinary:.5f})"
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
        title="Kernel machines follow the closed form; its modes are patterns in the images",
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
    """Fit the closed form, train from both starts, and compare."""
    n, kernel, views = options.num_pairs, _kernel(name, options.crop_size), _draw(seed, options)
    x1, x2 = (view[:n] for view in views)
    machine = ContrastiveKernelPCA(kernel, options.dim + EXTRA_MODES).fit(x1, x2)
    z, held_out = torch.cat([x1, x2]), torch.cat([view[n:] for view in views])
    k, rows = kernel(z, z), kernel(held_out, z)
    generator = torch.Generator().manual_seed(seed)
    a = ALPHA * torch.randn(options.dim, 2 * n, dtype=torch.float64, generator=generator)
    # The loss is invariant to the basis of the embedding. In this basis no function contains the modes of the previous
    # ones; in others float64 loses late modes to round-off next to learned ones.
    start = a @ k @ machine.coefficients_
    rotation = torch.linalg.qr(start[:, : options.dim]).Q.T
    a, start = rotation @ a, (rotation @ start).triu()
    gamma, rate = torch.diag(machine.eigenvalues_), RELATIVE_RATE / (4 * float(machine.eigenvalues_[0]))
    # In the basis of its eigenfunctions the machine is a linear model. This theory includes the finite learning rate.
    theory, flow = (LinearBarlowTwins(gamma, start, learning_rate=r) for r in (rate, None))
    times = theory.crossing_times()
    steps = int(DURATION * float(times.max()) / rate)
    a, record = train(a, k, rate, steps, f"kernel_pca, {name}, seed {seed}")
    final = _final_weights(theory, rate * (steps + 1), start, machine.eigenvalues_)
    f, ordinary = rows @ a.T, without_pairs(k, options.dim)
    numbers = {
        "held_out": float(subspace_alignment(f, rows @ machine.coefficients_ @ final.T)),
        "held_out_limit": float(subspace_alignment(f, machine.transform(held_out)[:, : options.dim])),
        "held_out_control": float(subspace_alignment(f, rows @ ordinary[1])),
        "permuted": permuted_alignment(f, machine.transform(held_out)[:, : options.dim]),
        "norm": excess_norm(a, k, machine.eigenvalues_[: options.dim]),
        "norm_control": excess_norm(ordinary[1].T, k, machine.eigenvalues_[: options.dim]),
    } | _aligned(machine, k, rows, held_out, ordinary, seed)
    predicted = theory_record(record, theory.embedding_eigenvalues(record.times))
    return Result(name, seed, machine, record, predicted, times, flow.crossing_times(), numbers)


def _final_weights(theory: LinearBarlowTwins, time: float, start: Tensor, gamma: Tensor) -> Tensor:
    """Return R_ij (s_i(t)/s_i(0))^{γ_j/γ_i} for a start R, (d, p) upper triangular, and γ, (p,)."""
    growth = theory.singular_values(time) / theory.initial_singular_values
    return start * growth[:, None] ** (gamma / gamma[: len(start), None]).clamp(max=1)  # R_ij = 0 for larger ones


def _aligned(
    machine: ContrastiveKernelPCA, k: Tensor, rows: Tensor, held_out: Tensor, ordinary: tuple[Tensor, Tensor], seed: int
) -> dict[str, float]:
    """Train from functions aligned with the eigenfunctions, and compare values on held-out points during training.

    The last comparison is with the limit, :meth:`ContrastiveKernelPCA.transform`. The final functions are compared with
    A k_Γ(Z, x) = C (A K̃ Aᵀ)⁻¹ A K(Z, x), which holds for eigenfunctions of the contrastive kernel.
    """
    mu, beta = ordinary
    d, p = len(mu), machine.n_components
    gamma = machine.eigenvalues_[:d]
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator)).Q
    start, other = (ALIGNED_EIGENVALUE / gamma).sqrt(), (ALIGNED_EIGENVALUE / mu).sqrt()
    a = rotation * start @ machine.coefficients_[:, :d].T
    rate = ALIGNED_RELATIVE_RATE / (4 * float(gamma[0]))
    duration = float(LinearBarlowTwins(torch.diag(gamma), torch.diag(start)).crossing_times(0.999).max())
    measured = torch.tensor(log_spaced_steps(int(duration / rate), NUM_TIMES))
    values, done = [], 0
    for count in measured.tolist():
        for _ in range(count - done):
            a = next_step(a, a @ k, rate)
        values.append(rows @ a.T)
        done = count
    times = rate * measured.double()
    forms = machine.transform_at(held_out, times, torch.nn.functional.pad(start, (0, p - d)))[..., :d]
    without = rows @ beta * LinearBarlowTwins(torch.diag(mu), torch.diag(other)).singular_values(times)[:, None]
    errors = [procrustes_error(f, g) for f, g in zip(values, forms, strict=True)]
    errors.append(procrustes_error(values[-1], machine.transform(held_out)[:, :d]))
    z = machine._views
    expected = correlation(a @ k) @ torch.linalg.solve(a @ k @ a.T, a @ rows.T)
    products = machine.contrastive_kernel(z, held_out), k @ rows.T / len(k)
    eigen = [float((a @ product - expected).norm() / expected.norm()) for product in products]
    return {
        "values": max(errors),
        "values_control": max(procrustes_error(f, g) for f, g in zip(values, without, strict=True)),
        "eigenfunctions": eigen[0],
        "eigenfunctions_control": eigen[1],
    }


def _claims(results: list[Result], seeds: list[int]) -> list[Claim]:
    ordinary = "ordinary kernel PCA"
    claims = []
    for kernel in KERNELS:
        summaries = [result.summary() for result in results if result.kernel == kernel]
        for name, sentence, relation, bound, control in (
            ("held_out", "alignment with the closed form at the end, held-out crops", ">=", MIN_ALIGNMENT[kernel],
             ordinary),
            ("step_times", "largest relative error of a predicted step time", "<=", 0.01, "theory of gradient flow"),
            ("values", "aligned start: largest relative error of the embedding of held-out crops at any time", "<=",
             0.015, ordinary),
            ("eigenfunctions", "aligned start: relative error of the contrastive kernel's products on held-out crops",
             "<=", 1e-6, "kernel without pairs"),
            ("norm", "relative distance of the norm of the final functions from the smallest", "<=", MAX_NORM[kernel],
             ordinary),
        ):  # fmt: skip
            values, controls = ([s[f"{name}{suffix}"] for s in summaries] for suffix in ("", "_control"))
            key, sentence = f"{_key(kernel)}_{name}", f"{kernel}: {sentence}"
            claims.append(worst(key, sentence, values, relation, bound, seeds, control, controls))
    return claims


def _extremes(machine: ContrastiveKernelPCA, crops: Tensor, modes: int = 5, count: int = 5) -> list[Any]:
    """Return the crops with the lowest and highest values of each mode, (2·count, h, w, 3), in [0, 1]."""
    values = machine.transform(crops)[:, :modes]
    low, high = crops.amin((0, 2, 3)), crops.amax((0, 2, 3))
    shown = ((crops - low[:, None, None]) / (high - low)[:, None, None]).permute(0, 2, 3, 1).numpy()
    order = values.argsort(0)
    return [shown[torch.cat([mode[:count], mode[-count:]]).numpy()] for mode in order.T]


FIGURE = PaperFigure("kernel_pca", __doc__, PAPER, PROFILES, produce)
