"""Losses with properties that shipped losses do not have: preferred directions, stop-gradients, faults."""

import torch
import torch.nn.functional as F  # noqa: N812


def metric_loss(z1, z2):
    """Spectral contrastive loss in a metric with different eigenvalues."""
    scales = torch.linspace(0.5, 2, z1.shape[1], dtype=z1.dtype)
    z1, z2 = z1 * scales, z2 * scales
    similarities = z1 @ z2.T
    return similarities.square().mean() - 2 * similarities.diagonal().mean()


def simsiam_loss(z1, z2):
    """SimSiam without a predictor: each view approaches the other, held constant."""
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    return -((z1 * z2.detach()).sum(1) + (z2 * z1.detach()).sum(1)).mean() / 2


def byol_loss(z1, z2):
    """BYOL with a fixed linear predictor that rotates and unequal weights of the views, without normalisation."""
    d = z1.shape[1]
    random = torch.randn(d, d, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(z1)
    predictor = (torch.eye(d).to(z1) + random - random.T) / 3
    first, second = (z1 @ predictor.T - z2.detach()).square(), (z2 @ predictor.T - z1.detach()).square()
    return (0.8 * first + 0.2 * second).sum(1).mean()


def ordered_loss(z1, z2):
    """Loss that compares each sample with the next one."""
    return (z1 * z2.roll(1, 0)).sum(1).mean()


def random_loss(z1, z2):
    """Loss with new random weights at each call."""
    return (z1 * z2 * torch.rand_like(z1)).sum()
