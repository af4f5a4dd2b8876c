"""Linear models W in the eigenbasis of Γ, an aligned start, a theory without pairs, and the norm of weights."""

from __future__ import annotations

import torch
from torch import Tensor

from reproduce.records import theory_record
from stepwise_lightning import FixedCropPairs, LinearEncoder, SpectrumRecord
from stepwise_lightning.plots import Panel
from stepwise_lightning.spectrum.schedule import log_spaced_steps
from stepwise_lightning.theory import LinearBarlowTwins, feature_cross_correlation, minimum_norm

# Aligned start: 4 × learning rate × γ_1, at which gradient flow errs by about 0.01, and initial eigenvalues of C.
ALIGNED_RELATIVE_RATE, ALIGNED_EIGENVALUE = 0.03, 0.01


def descend(gamma: Tensor, weights: Tensor, rate: float, steps: int) -> tuple[SpectrumRecord, Tensor]:
    """Iterate W ← W − 4η (W Γ Wᵀ − I) W Γ in the eigenbasis of Γ, from W(0), (d, m), float64.

    Returns:
        Record of up to 300 measurements, and W at these, (T, d, m).

    """
    measured_steps, measured = set(log_spaced_steps(steps, 300)), {}
    identity = torch.eye(len(weights)).double()
    for step in range(steps + 1):
        correlated = weights * gamma
        c = correlated @ weights.T
        if step in measured_steps:
            measured[step] = torch.linalg.eigvalsh(c).flip(0), weights
        weights = weights - 4 * rate * (c - identity) @ correlated
    values, path = (torch.stack(parts) for parts in zip(*measured.values(), strict=True))
    done = torch.tensor(list(measured))
    return SpectrumRecord.of(rate * done.double(), values, (1 - values).square().sum(1), steps=done), path


def train_aligned(seed: int, pairs: FixedCropPairs, dim: int) -> tuple[dict[str, float], Panel]:
    """Train from an aligned start, W(0) = U S(0) Vᵀ; return the largest relative errors of W(t), and the panel."""
    spectrum, vectors = (
        part.flip(-1)[..., :dim] for part in torch.linalg.eigh(feature_cross_correlation(pairs.x1, pairs.x2))
    )
    gamma, vectors = spectrum[spectrum > 0], vectors[:, spectrum > 0]
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(len(gamma), len(gamma), dtype=torch.float64, generator=generator)).Q
    start, rate = rotation * (ALIGNED_EIGENVALUE / gamma).sqrt(), ALIGNED_RELATIVE_RATE / (4 * float(gamma[0]))
    flow, exact = (LinearBarlowTwins(torch.diag(gamma), start, learning_rate=r) for r in (None, rate))
    record, weights = descend(gamma, start, rate, int(exact.crossing_times(0.99).max() / rate))
    size = weights.flatten(1).norm(dim=1)

    def error(predicted: Tensor) -> float:
        return float(((weights @ vectors.T - predicted).flatten(1).norm(dim=1) / size).max())

    times = record.times
    flowing, unpaired = error(flow.weights(times) @ vectors.T), without_pairs(pairs, start @ vectors.T).weights(times)
    numbers = {"aligned": flowing, "aligned_control": error(unpaired), "recursion_control": flowing}
    numbers["recursion"] = error(exact.weights(times) @ vectors.T)
    theory = theory_record(record, gamma * flow.singular_values(times) ** 2)
    return numbers, Panel(record, title="aligned start", theory=theory, step_times=flow.step_times)


def without_pairs(pairs: FixedCropPairs, weights0: Tensor) -> LinearBarlowTwins:
    """Return the gradient-flow theory of the same views, each paired with itself."""
    views = torch.cat([pairs.x1, pairs.x2])
    return LinearBarlowTwins(feature_cross_correlation(views, views), weights0)


def excess_norm(encoder: LinearEncoder, eigenvalues: Tensor, pairs: FixedCropPairs) -> float:
    """Return the relative distance of the norm of the trained weights, mapped to C = I, from the smallest one."""
    with torch.no_grad():
        weights, (z1, z2) = encoder.weight.double(), (encoder(x).double() for x in (pairs.x1, pairs.x2))
    c = (z1.T @ z2 + z2.T @ z1) / (2 * len(z1))
    norm = torch.linalg.solve(c, weights @ weights.T).trace().sqrt()
    return abs(float(norm / minimum_norm(eigenvalues)) - 1)
