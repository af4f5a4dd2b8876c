"""Kernel machines f(x) = A K(Z, x), trained on pairs of views Z = [X; X'], and measurements of them.

A is (d, 2n), K̃ = K(Z, Z) is (2n, 2n), and P swaps the views.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reproduce.processes import Progress, is_main_process
from stepwise_lightning import SpectrumRecord
from stepwise_lightning.spectrum.measures import cross_correlation_eigenvalues
from stepwise_lightning.spectrum.schedule import log_spaced_steps
from stepwise_lightning.theory import minimum_norm


def correlation(f: Tensor) -> Tensor:
    """Return C, (d, d), of embeddings f(Z), (d, 2n)."""
    return f @ f.roll(f.shape[1] // 2, 1).T / f.shape[1]


def next_step(a: Tensor, f: Tensor, rate: float) -> Tensor:
    """Return A after a step of gradient descent in the kernel's Hilbert space, A − 4η (C − I) A K̃ P / 2n, f = A K̃."""
    n = f.shape[1] // 2
    swapped = f.roll(n, 1)
    c = f @ swapped.T / (2 * n)
    return a - 4 * rate * (c - torch.eye(len(a))) @ swapped / (2 * n)


def train(a: Tensor, k: Tensor, rate: float, steps: int, title: str) -> tuple[Tensor, SpectrumRecord]:
    """Train the functions f(x) = A K(Z, x).

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
        a = next_step(a, f, rate)
        f = a @ k
        if progress is not None:
            progress.update()
    if progress is not None:
        progress.close()
    values, done = torch.stack(list(eigenvalues.values())), torch.tensor(list(eigenvalues))
    return a, SpectrumRecord.of(rate * done.double(), values, (1 - values).square().sum(1), steps=done)


def without_pairs(k: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues (d,) and coefficients (2n, d) of the closed form with P = I, ordinary kernel PCA."""
    values, vectors = (part.flip(-1)[..., :dim] for part in torch.linalg.eigh(k))
    return values / len(k), vectors / values.sqrt()


def excess_norm(a: Tensor, k: Tensor, gamma: Tensor) -> float:
    """Return the relative distance of the norm of A K(Z, x), mapped to C = I, from the smallest of a global minimum."""
    c = correlation(a @ k)
    if torch.linalg.eigvalsh(c)[0] <= 0:
        return math.inf  # no map leads to C = I
    return abs(float(torch.linalg.solve(c, a @ k @ a.T).trace().sqrt() / minimum_norm(gamma)) - 1)
