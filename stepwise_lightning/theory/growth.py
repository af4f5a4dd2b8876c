r"""How modes grow from a small start, for all three losses, under gradient descent with momentum (beyond the paper).

Legend
    n           number of positive pairs, with features h_i, h'_i in R^m: inputs, or what a last linear layer sees
    W (d, m)    weights of that layer, b (d,) its bias; the embedding of h is z = W h + b
    Γ (m, m)    the features' cross-correlation (1/2n) Σ_i (h_i h'_iᵀ + h'_i h_iᵀ), here of centred features
    Σ_1, Σ_2    covariance of either view; Σ that of all 2n views together about one mean; all unbiased
    D (m, m)    (1/n) Σ_i (h_i − h'_i)(h_i − h'_i)ᵀ
    H (m, m)    growth matrix: dW/dt = A W H while W is small, with A = I unless said otherwise
    ρ, γ        eigenvalue of H, of Γ
    η, β        learning rate, momentum; time t = η × number of steps
    x           ηρ, what drives a mode at each step
    r           what a growing mode's weights are multiplied by at each step
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stepwise_lightning.errors import UserError
from stepwise_lightning.losses import loss_settings
from stepwise_lightning.precision import as_float64
from stepwise_lightning.theory.moments import FeatureMoments

__all__ = ["expected_steps", "growth_matrix", "heavy_ball_growth"]

# A mode has no start of its own where less than this share of it is outside the faster modes.
_DEPENDENT = 1e-13


def growth_matrix(loss: str, h1: Tensor, h2: Tensor, dim: int, bias_norm: float = 1.0, **settings: Any) -> Tensor:
    r"""Return H of dW/dt = A W H, the gradient flow of a last linear layer z = W h + b while W is small.

    ======================================  ================================================  ====================
    loss                                    H                                                 valid while
    ======================================  ================================================  ====================
    Barlow Twins, ``normalize=False``       4 Γ, centred or not as ``center`` says            WΓWᵀ ≪ 1
    Barlow Twins, ``normalize=True``        4 Γ / ε, centred                                  variances ≪ ε
    VICReg                                  μ/(2d√ε) (Σ_1 + Σ_2) − (2λ/d) D                   variances ≪ ε
    SimCLR with a bias                      2/(τ‖b‖²) (Σ − D/2)                               ‖W h‖ ≪ ‖b‖√τ
    ``"dot_simclr"``, without bias          (2/τ) (Σ − D/2)                                   ‖W h‖² ≪ τ
    ======================================  ================================================  ====================

    Derivation: each loss is expanded to second order in W; its gradient is −A W H. With ‖C − I‖² it is the term −2 tr C
    alone that is of second order, so that no off-diagonal weight is in H; normalised, C is WΓWᵀ/ε up to fourth order.
    In VICReg the hinge is 1 − √(variance + ε) ≈ 1 − √ε − variance/2√ε; λ and μ are the weights of invariance and
    variance, and the covariances' squares are of fourth order. In SimCLR, where all embeddings are equal up to W h, the
    softmax is uniform, 1/(2n − 1) each, so that the loss compares the squared distance of a pair, tr W D Wᵀ, with the
    mean one of all views, 2 tr W Σ Wᵀ. The cosine of b + p and b + q is 1 − ‖p − q‖²/2‖b‖², up to third order, for p, q
    orthogonal to b: there A = I − b bᵀ/‖b‖², and along b nothing grows. Without a bias cosines know no small start.
    The bias stands still to first order, but for Barlow Twins that is not centred: there it is the weight of one more
    feature, which is one everywhere.

    Weight decay ω takes ω off every eigenvalue, as far as features stay. Of features in batches, H is the batches'
    mean, which they follow. In expectation over batches it is 1 − 1/n times that of an infinite batch for Barlow
    Twins, 1 − 1/(2n − 1) times for SimCLR, and does not depend on n for VICReg.

    Source: the limit of Simon et al. (arXiv 2303.15438) for Barlow Twins; all else beyond the paper.

    Args:
        loss: ``barlow_twins``, ``vicreg``, ``simclr``, or ``dot_simclr``, which has dot products for cosines and
            the same settings.
        h1: features of the first views, (n, m), or in batches, (batches, n, m).
        h2: features of the second views.
        dim: d, the dimension of the embedding; VICReg's weights are divided by it.
        bias_norm: ‖b‖ > 0, for SimCLR.
        settings: the loss's own arguments, with its own defaults; those that do not enter H change nothing.

    Returns:
        H, (m, m), symmetric, float64. Its eigenvalues may be negative: these modes decay.

    Raises:
        ValueError: an unknown loss or setting, d < 1, a norm, temperature or ε that is not positive; features as for
            :meth:`FeatureMoments.of`.

    """
    values = loss_settings("simclr" if loss == "dot_simclr" else loss, settings)
    if dim < 1 or not bias_norm > 0:
        raise UserError(f"dim must be at least 1 and bias_norm above 0, got {dim} and {bias_norm}")
    entering = {"barlow_twins": ["eps"] if values.get("normalize") else [], "vicreg": ["eps"]}.get(
        loss, ["temperature"]
    )
    for name in entering:
        if not values[name] > 0:
            raise UserError(f"{name} must be above 0 for a growth matrix, got {values[name]}")
    moments = FeatureMoments.of(h1, h2)
    if loss == "barlow_twins":
        return 4 * (moments.gamma() / values["eps"] if values["normalize"] else moments.gamma(values["center"]))
    if loss == "vicreg":
        variance = values["variance_weight"] / (2 * dim * values["eps"] ** 0.5)
        spread = moments.covariance1 + moments.covariance2
        return variance * spread - 2 * values["invariance_weight"] / dim * moments.difference
    scale = 2 / values["temperature"] / (bias_norm**2 if loss == "simclr" else 1.0)
    return scale * (moments.covariance - moments.difference / 2)


def heavy_ball_growth(drive: Tensor, momentum: float) -> tuple[Tensor, Tensor]:
    r"""Return r and c of a mode that grows under descent with momentum: w_t → c rᵗ w_0, exactly.

    The steps v ← βv + ρw, w ← w + ηv from v = 0 solve w_{t+1} − (1 + β + x) w_t + β w_{t−1} = 0, with x = ηρ:

        w_t = w_0 (c rᵗ + (1 − c) r'ᵗ),  r = [(1 + β + x) + √((1 + β + x)² − 4β)]/2,  r' = β/r,
        c = (1 + x − r')/(r − r').

    For x ≪ (1 − β)² this is ln r = x/(1 − β); for x ≫ (1 − β)² it is ln r ≈ √x, far less. c < 1 delays a mode by
    −ln c / ln r steps. Source: the textbook analysis of the heavy ball on a quadratic.

    Args:
        drive: x = ηρ ≥ 0, any shape.
        momentum: β in [0, 1).

    Returns:
        r ≥ 1 and c, float64, of the shape of ``drive``.

    Raises:
        ValueError: a drive below 0 (a mode that decays may oscillate) or a momentum out of range.

    """
    drive = as_float64(drive, "drive")
    check_momentum(momentum)
    if not (drive >= 0).all():
        raise UserError("drive must be ≥ 0 and not NaN: it is learning rate × growth rate of a mode that grows")
    excess = _excess(drive, momentum)
    root = 1 + excess
    other = momentum / root
    return root, (1 + drive - other) / (root - other)


def _excess(drive: Tensor, momentum: float) -> Tensor:
    """Return r − 1 = (x + √(friction² + s) − friction) / 2, the difference of the last two written as a quotient."""
    friction = 1 - momentum
    s = 2 * (1 + momentum) * drive + drive.square()
    return (drive + s / ((friction**2 + s).sqrt() + friction)) / 2


def expected_steps(
    growth: Tensor, measured: Tensor, weights0: Tensor, learning_rate: float, momentum: float, threshold: float
) -> Tensor:
    r"""Return after how many optimiser steps each mode reaches a threshold, were growth never to saturate.

    In the eigenbasis V of H, descending, W_0 V_{≤d} = U R. With m_k = v_kᵀ M v_k, mode k's eigenvalue grows as
    c_k² r_k^{2t} R_kk² m_k, so that

        step_k = ln(θ / (c_k² R_kk² m_k)) / (2 ln r_k).

    M is what is measured: Γ for Barlow Twins; for VICReg the features' covariance (:attr:`FeatureMoments.pooled`); for
    SimCLR that over ‖b‖², with (I − b bᵀ/‖b‖²) W_0 in place of W_0. It holds for the first mode of every loss, and
    for all of Barlow Twins, whose modes saturate each on its own, as far as neighbours are apart: see
    :class:`LinearBarlowTwins`. Later modes of VICReg and SimCLR are slowed, or borrowed from, by earlier ones, and a
    schedule changes r from step to step: :class:`LastLayer` simulates both.

    Args:
        growth: H, (m, m), see :func:`growth_matrix`; less ω on its diagonal under weight decay.
        measured: M, (m, m).
        weights0: W_0, (d, m).
        learning_rate: η > 0.
        momentum: β in [0, 1).
        threshold: θ > 0.

    Returns:
        (d,) float64, not rounded; 0 for a mode that starts above θ, infinite for one that does not grow.

    Raises:
        ValueError: wrong shapes, or a rate, momentum or threshold out of range.

    """
    growth, measured = as_float64(growth, "growth"), as_float64(measured, "measured")
    weights0 = as_float64(weights0, "weights0")
    m = len(growth)
    if growth.shape != (m, m) or measured.shape != (m, m) or weights0.ndim != 2 or weights0.shape[1] != m:
        raise UserError(
            "growth and measured must be (m, m) and weights0 (d, m), "
            f"got {tuple(growth.shape)}, {tuple(measured.shape)} and {tuple(weights0.shape)}"
        )
    if not learning_rate > 0 or not threshold > 0:
        raise UserError(f"learning_rate and threshold must be above 0, got {learning_rate} and {threshold}")
    rates, vectors = torch.linalg.eigh(growth)
    k = min(len(weights0), m)
    rates, vectors = rates.flip(0)[:k], vectors.flip(1)[:, :k]
    r = torch.linalg.qr(weights0 @ vectors).R
    own = torch.where(r.diagonal().abs() > _DEPENDENT * r.norm(dim=0), r.diagonal(), 0.0)  # R_kk, without round-off
    start = own.square() * (vectors * (measured @ vectors)).sum(0)
    root, amplitude = heavy_ball_growth(learning_rate * rates.clamp(min=0), momentum)
    steps = (threshold / (amplitude.square() * start)).log().clamp(min=0) / (2 * root.log())
    steps = torch.where((rates > 0) & (start > 0), steps, math.inf)
    return torch.nn.functional.pad(torch.where(start >= threshold, 0.0, steps), (0, len(weights0) - k), value=math.inf)


def check_momentum(momentum: float) -> None:
    """Raise a ValueError for a momentum outside [0, 1)."""
    if not 0 <= momentum < 1:
        raise UserError(f"momentum must lie in [0, 1), got {momentum}")
