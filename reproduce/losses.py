"""Losses of other papers, and wrong variants of SimCLR and VICReg, as functions of both views' embeddings (n, d)."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from stepwise_lightning.losses import VARIANCE_WEIGHT, vicreg_loss


def dcl_loss(z1: Tensor, z2: Tensor, temperature: float = 0.5) -> Tensor:
    """Return the decoupled contrastive loss: without the positive pair in the denominator, negatives in the other view.

    Source: Yeh et al., ECCV 2022 (arXiv 2110.06848). The mean over both directions of
    −s_ii/τ + log Σ_{k≠i} exp(s_ik/τ), s the cosine similarity of the views.
    """
    similarities = _cosines(z1, z2) / temperature
    negatives = similarities.masked_fill(_identity(z1), -torch.inf)
    denominators = negatives.logsumexp(0).mean() + negatives.logsumexp(1).mean()
    return denominators / 2 - similarities.diagonal().mean()


def clip_loss(z1: Tensor, z2: Tensor, temperature: float = 0.07) -> Tensor:
    """Return the symmetric cross-entropy of CLIP (Radford et al., ICML 2021, arXiv 2103.00020)."""
    similarities = _cosines(z1, z2) / temperature
    labels = torch.arange(len(z1), device=z1.device)
    return (F.cross_entropy(similarities, labels) + F.cross_entropy(similarities.T, labels)) / 2


def siglip_loss(z1: Tensor, z2: Tensor, temperature: float = 0.1, offset: float = -10.0) -> Tensor:
    """Return the sigmoid loss of SigLIP at its initial temperature and offset (Zhai et al., ICCV 2023, 2303.15343)."""
    logits = _cosines(z1, z2) / temperature + offset
    signs = 2 * _identity(z1).to(logits.dtype) - 1
    return -F.logsigmoid(signs * logits).sum() / len(z1)


def lejepa_loss(z1: Tensor, z2: Tensor, sigreg_weight: float = 0.05, num_directions: int = 64, seed: int = 0) -> Tensor:
    """Return (1 − λ) times the distance of the views from their mean, plus λ times SIGReg, on fixed directions.

    SIGReg is the Epps–Pulley distance between the standard normal distribution and the projections of all 2n
    embeddings, averaged over directions. Source: Balestriero and LeCun, arXiv 2511.08544. The authors draw new
    directions at every step; they are fixed here, as growth rates of modes are defined for one function.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(z1.shape[1], num_directions, generator=generator, dtype=torch.float64)
    directions = F.normalize(directions, dim=0).to(z1)
    points = torch.linspace(0, 3, 17, dtype=z1.dtype, device=z1.device)
    target = (-points.square() / 2).exp()
    weights = torch.full_like(points, 2 * 3 / 16)  # trapezoidal rule on [−3, 3]
    weights[[0, -1]] /= 2
    projections = (torch.cat([z1, z2]) @ directions)[:, :, None] * points
    errors = (projections.cos().mean(0) - target).square() + projections.sin().mean(0).square()
    sigreg = 2 * len(z1) * (errors @ (weights * target)).mean()
    distance = (z1 - z2).square().sum(1).mean() / 4
    return (1 - sigreg_weight) * distance + sigreg_weight * sigreg


def whitening_loss(z1: Tensor, z2: Tensor, eps: float = 0.1) -> Tensor:
    """Return d minus the trace of the cross-correlation of whitened views, as in W-MSE, with ε added to covariances.

    W-MSE (Ermolov et al., ICML 2021, arXiv 2007.06346) is the squared distance of whitened views, which equals twice
    this value at ε = 0. With ε the loss is defined at equal embeddings.
    """
    whitened = []
    for z in (z1, z2):
        centred = z - z.mean(0)
        covariance = centred.T @ centred / len(z)
        factor = torch.linalg.cholesky(covariance + eps * torch.eye(z.shape[1], dtype=z.dtype, device=z.device))
        whitened.append(torch.linalg.solve_triangular(factor, centred.T, upper=False))
    return z1.shape[1] - (whitened[0] * whitened[1]).sum() / len(z1)


def isoloss(z1: Tensor, z2: Tensor) -> Tensor:
    """Return the Euclidean IsoLoss in both directions, with the second moment C_z of all embeddings as predictor.

    Source: Halvagal et al., NeurIPS 2023 (arXiv 2212.04858), and ``isoloss_func_l2`` in their code. The loss of BYOL,
    ‖C_z z − sg(z')‖², has the gradient 2 C_z (C_z z − z'); IsoLoss removes the first factor.
    """
    moment = (z1.T @ z1 + z2.T @ z2).detach() / (2 * len(z1))
    errors = [z - (z + other - z @ moment).detach() for z, other in ((z1, z2), (z2, z1))]
    return torch.cat(errors).square().sum() / len(z1)


def self_similarity_loss(z1: Tensor, z2: Tensor, temperature: float = 0.5) -> Tensor:
    """Return SimCLR's loss with the similarity of each view with itself in the denominator, a frequent error."""
    z = torch.cat([z1, z2])
    similarities = _cosines(z, z) / temperature
    return similarities.logsumexp(1).mean() - similarities.diagonal(len(z1)).mean()


def squared_hinge_loss(z1: Tensor, z2: Tensor, eps: float = 1e-4) -> Tensor:
    """Return VICReg's loss with squared hinges in the variance term."""
    loss, hinges = vicreg_loss(z1, z2, variance_weight=0.0, eps=eps), z1.new_zeros(())
    for z in (z1, z2):
        hinges = hinges + F.relu(1 - (z.var(0) + eps).sqrt()).square().mean()
    return loss + VARIANCE_WEIGHT * hinges / 2


def _cosines(z1: Tensor, z2: Tensor) -> Tensor:
    return F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).T


def _identity(z: Tensor) -> Tensor:
    return torch.eye(len(z), dtype=torch.bool, device=z.device)
