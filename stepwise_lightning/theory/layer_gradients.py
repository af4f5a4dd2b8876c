r"""Gradients of losses with respect to the weights W of a last linear layer z = W h on fixed features.

============================  ===========================================================================
loss                          gradient
============================  ===========================================================================
Barlow Twins                  2 G W Γ
… normalised                  N W Xᵀ + Nᵀ W X − diag(s_1² (G∘C)1) W S_1 − diag(s_2² (G∘C)ᵀ1) W S_2
VICReg                        (2λ/d) W D + Σ_v [(4ν/d) off(C_v) − diag(μ 1[σ_v < 1] / 2dσ_v)] W Σ_v
spectral contrastive          −4 W Γ + 2n/(n − 1) (Z_2 W M_1 + Z_1 W M_2 − Σ_i s_i (z'_i h_iᵀ + z_i h'_iᵀ)/n²)
SimCLR                        Σ_i (du_i − u_i u_i·du_i)/‖z_i‖ h_iᵀ, du = (E + Eᵀ) u / 2nτ
any function                  Σ_i (∂L/∂z_i h_iᵀ + ∂L/∂z'_i h'_iᵀ), by automatic differentiation
============================  ===========================================================================

Legend
    n, d, m     pairs of a batch, with features h_i, h'_i in R^m; W (d, m)
    Γ, Σ_v, D   moments of the features, see :mod:`stepwise_lightning.theory.moments`
    C           Barlow Twins: W Γ Wᵀ; normalised: s_1 W X Wᵀ s_2, with X the cross-correlation of the views' features
                and s_v the diagonal matrix of 1/√(diag(W S_v Wᵀ) + ε), S_v = Σ_v (n − 1)/n
    G           derivative of the loss with respect to C: 2(C − I) on the diagonal, 2κC off it (κ its weight)
    N           s_1 G s_2
    C_v, σ_v    VICReg: W Σ_v Wᵀ, √(diag C_v + ε); λ, μ, ν the weights of invariance, variance, covariance
    M_v, Z_v    spectral contrastive: second moments of the features, not centred, Z_v = W M_v Wᵀ; s_i = z_i · z'_i
    u, E        SimCLR: z/‖z‖; the softmax of uuᵀ/τ without the diagonal, less one at each pair; τ the temperature

Source: derived here from the losses in :mod:`stepwise_lightning.losses`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from stepwise_lightning.theory.loss_derivatives import PairLoss, loss_value
from stepwise_lightning.theory.moments import FeatureMoments

# Spectral contrastive: number of pairs from which the squared similarities s_i² of pairs, a correction of order d/n to
# the mean over all i, j, are estimated; they need every pair, not moments.
_SAMPLED_PAIRS = 1024
# Maps the weights to the gradient.
Gradient = Callable[[Tensor], Tensor]


def layer_gradient(loss: str | PairLoss, h1: Tensor, h2: Tensor, dim: int, settings: Mapping[str, Any]) -> Gradient:
    """Return the gradient of a loss as a function of W (d, m), for features of both views, float64, (batches, n, m).

    Barlow Twins and VICReg use the mean moments of the batches; the spectral contrastive loss one batch of all pairs;
    SimCLR and functions the first batch only. ``settings`` are all arguments of a loss given by its name.
    """
    if not isinstance(loss, str):
        return _differentiated(loss, h1[0], h2[0])
    return _GRADIENTS[loss](h1, h2, dim, **settings)


def _differentiated(loss: PairLoss, h1: Tensor, h2: Tensor) -> Gradient:
    def gradient(w: Tensor) -> Tensor:
        with torch.enable_grad():
            z1, z2 = ((h @ w.T).requires_grad_() for h in (h1, h2))
            dz1, dz2 = torch.autograd.grad(loss_value(loss, z1, z2), (z1, z2), materialize_grads=True)
        return dz1.T @ h1 + dz2.T @ h2

    return gradient


def _barlow_twins(h1: Tensor, h2: Tensor, dim: int, normalize: bool, **settings: Any) -> Gradient:
    barlow_twins = _normalized_barlow_twins if normalize else _analytical_barlow_twins
    return barlow_twins(FeatureMoments.of(h1, h2), **settings)


def _analytical_barlow_twins(moments: FeatureMoments, off_diagonal_weight: float, center: bool, **_: Any) -> Gradient:
    gamma = moments.gamma(center)

    def gradient(w: Tensor) -> Tensor:
        wg = w @ gamma
        c = wg @ w.T
        g = 4 * off_diagonal_weight * c
        g.diagonal().copy_(4 * (c.diagonal() - 1))
        return g @ wg

    return gradient


def _normalized_barlow_twins(moments: FeatureMoments, off_diagonal_weight: float, eps: float, **_: Any) -> Gradient:
    biased = 1 - 1 / moments.num_pairs
    features = torch.stack([moments.cross, moments.cross.T, moments.covariance1 * biased, moments.covariance2 * biased])

    def gradient(w: Tensor) -> Tensor:
        wx, wxt, ws1, ws2 = w @ features
        scale1, scale2 = (((ws * w).sum(1) + eps).rsqrt() for ws in (ws1, ws2))
        c = scale1[:, None] * (wx @ w.T) * scale2
        g = 2 * off_diagonal_weight * c
        g.diagonal().copy_(2 * (c.diagonal() - 1))
        n, product = scale1[:, None] * g * scale2, g * c
        shrinking = (scale1**2 * product.sum(1))[:, None] * ws1 + (scale2**2 * product.sum(0))[:, None] * ws2
        return n @ wxt + n.T @ wx - shrinking

    return gradient


def _vicreg(
    h1: Tensor,
    h2: Tensor,
    dim: int,
    invariance_weight: float,
    variance_weight: float,
    covariance_weight: float,
    eps: float,
) -> Gradient:
    moments = FeatureMoments.of(h1, h2)
    features = torch.stack([moments.covariance1, moments.covariance2, moments.difference])
    invariance, variance, covariance = 2 * invariance_weight / dim, variance_weight / 2 / dim, covariance_weight / dim

    def gradient(w: Tensor) -> Tensor:
        products = w @ features
        spread = products[:2]
        c = spread @ w.T
        deviations = (c.diagonal(dim1=1, dim2=2) + eps).sqrt()
        c.mul_(4 * covariance)
        c.diagonal(dim1=1, dim2=2).copy_(torch.where(deviations < 1, -variance / deviations, 0.0))
        return invariance * products[2] + (c @ spread).sum(0)

    return gradient


def _spectral_contrastive(h1: Tensor, h2: Tensor, dim: int) -> Gradient:
    h1, h2 = h1.flatten(0, 1), h2.flatten(0, 1)
    n = len(h1)
    cross = h1.T @ h2 / n
    features = torch.stack([h1.T @ h1 / n, h2.T @ h2 / n, cross + cross.T])
    x1, x2 = h1[:_SAMPLED_PAIRS], h2[:_SAMPLED_PAIRS]

    def gradient(w: Tensor) -> Tensor:
        wm1, wm2, aligned = w @ features
        z1, z2 = x1 @ w.T, x2 @ w.T
        products = (z1 * z2).sum(1, keepdim=True) / (n * len(x1))
        repulsion = (wm2 @ w.T) @ wm1 + (wm1 @ w.T) @ wm2 - (products * z2).T @ x1 - (products * z1).T @ x2
        return 2 * n / (n - 1) * repulsion - 2 * aligned

    return gradient


def _simclr(h1: Tensor, h2: Tensor, dim: int, temperature: float) -> Gradient:
    h, n = torch.cat([h1[0], h2[0]]), h1.shape[1]
    scale = 1 / (2 * n * temperature)

    def gradient(w: Tensor) -> Tensor:
        z = h @ w.T
        norms = z.norm(dim=1, keepdim=True).clamp(min=1e-12)  # as torch.nn.functional.normalize
        u = z / norms
        similarities = (u @ u.T).div_(temperature)
        similarities.fill_diagonal_(-math.inf)
        e = similarities.softmax(1)
        e.diagonal(n).sub_(1)
        e.diagonal(-n).sub_(1)
        du = (e @ u).add_(e.T @ u).mul_(scale)
        dz = (du - u * (u * du).sum(1, keepdim=True)) / norms
        return dz.T @ h

    return gradient


_GRADIENTS: dict[str, Callable[..., Gradient]] = {
    "barlow_twins": _barlow_twins,
    "vicreg": _vicreg,
    "simclr": _simclr,
    "spectral_contrastive": _spectral_contrastive,
}
