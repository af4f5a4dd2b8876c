"""Wide networks with symmetric initial weights, their tangent kernels, and kernel machines."""

from __future__ import annotations

from dataclasses import dataclass

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from reproduce.controls import kernel_matrix_pca
from reproduce.processes import step_progress
from stepwise_lightning import MLP, BarlowTwins, FixedCropPairs, SpectrumLogger, SpectrumRecord
from stepwise_lightning.theory import ContrastiveKernelPCA, EmpiricalNTK, LinearBarlowTwins, subspace_alignment

KERNELS = {"full": "all", "last": "last"}  # parameters of EmpiricalNTK


@dataclass(frozen=True)
class Variant:
    """Initial weights (standard deviation ``factor · width^(−exponent)``), training rule and length of training."""

    factor: float
    exponent: float
    relative_rate: float
    """4 × learning rate × γ_1 at initialisation. In the rich network γ_1 grows by a factor of about 3."""
    duration: float
    """Time of training, as a factor of the last step time predicted by the tangent kernel of the trained layers."""
    trained: str = "full"
    """Kernel of the trained parameters."""


VARIANTS = {
    "lazy": Variant(8.0, 0.25, 0.5, 1.4),
    "last layer only": Variant(8.0, 0.25, 0.35, 1.4, "last"),  # γ_1 of the full kernel is about twice as large
    "rich": Variant(2.0, 0.5, 0.2, 0.8),
}


def linear_layers(encoder: MLP) -> list[nn.Linear]:
    """Return the linear layers, first to last."""
    return [layer for layer in encoder if isinstance(layer, nn.Linear)]


@torch.no_grad()
def symmetric_mlp(in_features: int, units: int, dim: int, scale: float, seed: int) -> MLP:
    """Return a network whose outputs are 0, with one tangent kernel for all outputs and none between them.

    Args:
        in_features: number of inputs.
        units: number of distinct hidden units, each repeated 2 · dim times.
        dim: d, number of outputs.
        scale: standard deviation of the weights into the units; weights into an output have √d times this, or are 0.
        seed: seed of the weights.

    """
    encoder = MLP(in_features, [2 * dim * units], dim, bias=False, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    hidden, output = (torch.randn(rows, k, generator=generator) for rows, k in ((units, in_features), (1, units)))
    weights = torch.kron(torch.eye(dim), scale * dim**0.5 * output)  # output o depends on copy o of the units
    first, last = linear_layers(encoder)
    first.weight.copy_(scale * hidden.repeat(2 * dim, 1))
    last.weight.copy_(torch.cat([weights, -weights], 1))
    return encoder


@torch.no_grad()
def add_small_start(encoder: MLP, z: Tensor, size: float, seed: int) -> None:
    """Add random weights to the last layer, whose outputs for ``z`` have the root mean square ``size``."""
    first, last = linear_layers(encoder)
    weights = torch.randn(last.weight.shape, generator=torch.Generator().manual_seed(seed + 1_000_003)).to(z)
    last.weight.add_(weights * size / (first(z).relu() @ weights.T).square().mean().sqrt())


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
    first = linear_layers(encoder)[0]
    first.weight = nn.Parameter((first.weight.double() @ basis).float())
    encoder.in_features = first.in_features = basis.shape[1]
    z1, z2 = (views @ basis).float().chunk(2)
    return z1, z2


def train(encoder: MLP, rate: float, pairs: FixedCropPairs, steps: int, logger: TensorBoardLogger) -> SpectrumRecord:
    """Train by full-batch gradient descent on the analytical Barlow Twins loss; return the spectra and embeddings."""
    module = BarlowTwins(encoder, rate, off_diagonal_weight=1.0, normalize=False)
    log = SpectrumLogger(matrices=["cross_correlation"], num_points=150, keep_embeddings=True)
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=logger,
        callbacks=[log, *step_progress("kernel_mlp", steps)], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, log_every_n_steps=50,
    )  # fmt: skip
    trainer.fit(module, datamodule=pairs)
    return log.record


def tangent_kernels(encoder: nn.Module, z: Tensor) -> dict[str, Tensor]:
    """Return the tangent kernels of all parameters and of the last layer, (2n, 2n)."""
    return {name: EmpiricalNTK(encoder, parameters)(z, z) for name, parameters in KERNELS.items()}


def kernel_machine(k: Tensor, f: Tensor, rate: float, steps: list[int]) -> Tensor:
    """Return the embeddings (T, 2n, d) at these steps of gradient descent from ``f`` (2n, d) under a fixed kernel."""
    n, embeddings = len(k) // 2, {}
    for step in range(steps[-1] + 1):
        embeddings[step] = f
        swapped = f.roll(n, 0)
        f = f - 4 * rate * k @ swapped @ (f.T @ swapped / (2 * n) - torch.eye(f.shape[1])) / (2 * n)
    return torch.stack([embeddings[step] for step in steps])


def predicted_step_times(machine: ContrastiveKernelPCA, f0: Tensor, rate: float) -> Tensor:
    """Return predicted step times, (d,); infinite for modes that the kernel does not have."""
    start = machine.initial_singular_values(*f0.chunk(2))
    theory = LinearBarlowTwins(torch.diag(machine.eigenvalues_), torch.diag(start), learning_rate=rate)
    return torch.nn.functional.pad(theory.step_times, (0, f0.shape[1] - len(start)), value=np.inf)


def distance(a: Tensor, b: Tensor) -> float:
    """Return ‖a − b‖ / ‖b‖."""
    return float((a - b).norm() / b.norm())


def compare_machines(f: Tensor, machines: dict[str, Tensor], final: Tensor) -> dict[str, float]:
    """Compare the final embeddings with the kernel machines, and with the closed form of wrong pairs."""
    wrong = kernel_matrix_pca(final, f.shape[1], shift=1)[1]
    return {
        **{f"{name}_machine": float(subspace_alignment(f, g[-1])) for name, g in machines.items()},
        **{f"{name}_embedding_error": distance(g[-1], f) for name, g in machines.items()},
        "wrong_pairs_final": float(subspace_alignment(f, wrong)),
    }
