r"""Growth rates of modes from a small start, under gradient descent with momentum.

The growth matrix of Barlow Twins is the limit of Simon et al. (arXiv 2303.15438); the others are derived here.

Legend
    n           number of positive pairs, with features h_i, h'_i in R^m: inputs, or the inputs of a last linear layer
    W (d, m)    weights of that layer, b (d,) its bias; the embedding of h is z = W h + b
    Γ, Σ, D     moments of the features, see :mod:`stepwise_lightning.theory.moments`; Γ of centred features
    H (m, m)    growth matrix: dW/dt = A W H while W is small, with A = I except where noted
    ρ, γ        eigenvalue of H, of Γ
    η, β        learning rate, momentum; time t = η × number of steps
    x           ηρ, the drive of a mode
    r           factor by which the weights of a growing mode are multiplied at each step
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stepwise_lightning.errors import UserError
from stepwise_lightning.losses import loss_settings
from stepwise_lightning.precision import TensorLike, as_float64
from stepwise_lightning.theory.linear_flow import checked_signature, isotropic_growth_matrix
from stepwise_lightning.theory.loss_derivatives import PairLoss
from stepwise_lightning.theory.loss_signature import bound_loss
from stepwise_lightning.theory.moments import FeatureMoments, validated_features


def growth_matrix(
    loss: str | PairLoss,
    h1: TensorLike,
    h2: TensorLike,
    dim: int,
    bias_norm: float | None = None,
    **settings: Any,
) -> Tensor:
    r"""Return H of dW/dt = A W H, the gradient flow of a last linear layer z = W h + b while W is small.

    ======================================  ================================================  ====================
    loss                                    H                                                 valid while
    ======================================  ================================================  ====================
    Barlow Twins, ``normalize=False``       4 Γ, centred if ``center``                        WΓWᵀ ≪ 1
    Barlow Twins, ``normalize=True``        4 Γ / ε, centred                                  variances ≪ ε
    VICReg                                  μ/(2d√ε) (Σ_1 + Σ_2) − (2λ/d) D                   variances ≪ ε
    SimCLR with a bias                      2/(τ‖b‖²) (Σ − D/2)                               ‖W h‖ ≪ ‖b‖√τ
    spectral contrastive                    4 Γ, not centred                                  WΓWᵀ ≪ 1
    any isotropic function                  −Σ (α_ac M_ca + β_ac m_c m_aᵀ)                    depends on the loss
    ======================================  ================================================  ====================

    Derivation: expand each loss to second order in W; its gradient is −A W H. In ‖C − I‖² only the term −2 tr C is of
    second order, and the off-diagonal weight does not enter; normalised, C is WΓWᵀ/ε up to fourth order. The hinge of
    VICReg is 1 − √(variance + ε) ≈ 1 − √ε − variance/2√ε, λ and μ are the weights of invariance and variance, and the
    squared covariances are of fourth order. In SimCLR with equal embeddings the softmax is uniform, 1/(2n − 1) each:
    the loss compares the squared distance of a pair, tr W D Wᵀ, with the mean over all views, 2 tr W Σ Wᵀ. The cosine
    of b + p and b + q is 1 − ‖p − q‖²/2‖b‖² up to third order, for p, q orthogonal to b; hence A = I − b bᵀ/‖b‖², and
    nothing grows along b. Without a bias SimCLR has no small-start limit. The bias is constant to first order, except
    in the losses without centring, where it is the weight of an additional constant feature 1.

    For a function, H follows from its signature α, β (:func:`loss_signature`), by automatic differentiation. The closed
    forms of the named losses agree with it, and do not evaluate the loss.

    Weight decay ω subtracts ω from every eigenvalue, for fixed features. For features in batches, H is the mean over
    batches. Its expectation is the H of an infinite batch times 1 − 1/n for Barlow Twins, 1 − 1/(2n − 1) for SimCLR,
    and 1 for VICReg.

    Args:
        loss: a name in ``stepwise_lightning.losses.LOSSES``, or a function of both views' embeddings (n, d) that has
            its settings.
        h1: features of the first views, (n, m), or in batches, (batches, n, m); tensor or array. n is the batch size
            of the loss.
        h2: features of the second views, of the same shape.
        dim: d, the dimension of the embedding; VICReg's weights are divided by it.
        bias_norm: ‖b‖ > 0, for SimCLR (default 1) and other functions of the cosine similarity; None for no bias.
        settings: arguments of the loss, with the loss's defaults; settings that do not enter H are ignored.

    Returns:
        H, (m, m), float64, symmetric except for functions with a stop-gradient. Modes with negative eigenvalues decay.

    Raises:
        ValueError: an unknown loss or setting; d < 1; a norm, temperature or ε that is not positive; invalid features,
            of fewer than 2 pairs; a function that is not isotropic (:func:`growth_modes` supports it) or has no
            growth rates.

    """
    if dim < 1 or not (bias_norm is None or bias_norm > 0):
        raise UserError(f"dim must be at least 1 and bias_norm above 0, got {dim} and {bias_norm}")
    if not isinstance(loss, str):
        return _growth_matrix_of_function(bound_loss(loss, settings), h1, h2, dim, bias_norm)
    values = loss_settings(loss, settings)
    return _GROWTH[loss](FeatureMoments.of(h1, h2), dim, bias_norm or 1.0, **values)


def _barlow_twins(
    moments: FeatureMoments, dim: int, bias_norm: float, normalize: bool, center: bool, eps: float, **_: Any
) -> Tensor:
    return 4 * (moments.gamma() / _positive(eps=eps) if normalize else moments.gamma(center))


def _spectral_contrastive(moments: FeatureMoments, dim: int, bias_norm: float) -> Tensor:
    return 4 * moments.gamma(center=False)


def _vicreg(
    moments: FeatureMoments,
    dim: int,
    bias_norm: float,
    invariance_weight: float,
    variance_weight: float,
    eps: float,
    **_: Any,
) -> Tensor:
    variance = variance_weight / (2 * dim * _positive(eps=eps) ** 0.5)
    spread = moments.covariance1 + moments.covariance2
    return variance * spread - 2 * invariance_weight / dim * moments.difference


def _simclr(moments: FeatureMoments, dim: int, bias_norm: float, temperature: float) -> Tensor:
    factor = 2 / _positive(temperature=temperature) / bias_norm**2
    return factor * (moments.covariance - moments.difference / 2)


def _positive(**setting: float) -> float:
    ((name, value),) = setting.items()
    if not value > 0:
        raise UserError(f"{name} must be above 0 for a growth matrix, got {value}")
    return value


_GROWTH: dict[str, Callable[..., Tensor]] = {
    "barlow_twins": _barlow_twins,
    "vicreg": _vicreg,
    "simclr": _simclr,
    "spectral_contrastive": _spectral_contrastive,
}


def _growth_matrix_of_function(
    loss: PairLoss, h1: TensorLike, h2: TensorLike, dim: int, bias_norm: float | None
) -> Tensor:
    h1, h2 = validated_features(h1, h2)
    bias = None
    if bias_norm is not None:
        generator = torch.Generator().manual_seed(0)
        bias = torch.randn(dim, generator=generator, dtype=torch.float64, device="cpu")
        bias *= bias_norm / bias.norm()
    signature = checked_signature(loss, dim, h1.shape[1], bias)
    if not signature.isotropic:
        raise UserError(
            "the loss has no growth matrix, because it prefers directions of the embedding: use growth_modes"
        )
    return isotropic_growth_matrix(signature, h1, h2)


def heavy_ball_growth(drive: TensorLike, momentum: float) -> tuple[Tensor, Tensor]:
    r"""Return r and c of a growing mode under gradient descent with momentum: w_t → c rᵗ w_0.

    The steps v ← βv + ρw, w ← w + ηv from v = 0 solve w_{t+1} − (1 + β + x) w_t + β w_{t−1} = 0, with x = ηρ:

        w_t = w_0 (c rᵗ + (1 − c) r'ᵗ),  r = [(1 + β + x) + √((1 + β + x)² − 4β)]/2,  r' = β/r,
        c = (1 + x − r')/(r − r').

    ln r = x/(1 − β) for x ≪ (1 − β)², and ln r ≈ √x, far less, for x ≫ (1 − β)². A c < 1 delays a mode by
    −ln c / ln r steps. Source: textbook analysis of the heavy ball on a quadratic.

    Args:
        drive: x = ηρ ≥ 0, any shape.
        momentum: β in [0, 1).

    Returns:
        r ≥ 1 and c, float64, of the shape of ``drive``.

    Raises:
        ValueError: a negative drive (a decaying mode may oscillate), or a momentum out of range.

    """
    drive = as_float64(drive, "drive")
    check_momentum(momentum)
    if not (drive >= 0).all():
        raise UserError("drive must be ≥ 0 and not NaN: pass learning rate × growth rate of growing modes only")
    friction = 1 - momentum
    s = 2 * (1 + momentum) * drive + drive.square()
    # r = 1 + (x + √(friction² + s) − friction) / 2; the difference as a quotient, to avoid cancellation
    root = 1 + (drive + s / ((friction**2 + s).sqrt() + friction)) / 2
    other = momentum / root
    return root, (1 + drive - other) / (root - other)


def check_momentum(momentum: float) -> None:
    """Raise a ValueError for a momentum outside [0, 1)."""
    if not 0 <= momentum < 1:
        raise UserError(f"momentum must lie in [0, 1), got {momentum}")
