"""Losses with properties that shipped losses do not have: preferred directions, stop-gradients, faults."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn


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


class Metric(nn.Module):
    """Metric loss with float32 scales in a buffer, and a counter of calls."""

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("scales", torch.linspace(0.5, 2, dim))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, z1, z2):
        self.calls += 1
        similarities = (z1 * self.scales) @ (z2 * self.scales).T
        return similarities.square().mean() - 2 * similarities.diagonal().mean()


def terms_in_place(z1, z2):
    """Metric loss as two terms, with operations in place on the embeddings."""
    scales = torch.linspace(0.5, 2, z1.shape[1], dtype=z1.dtype)
    z1 *= scales
    z2 *= scales
    similarities = z1 @ z2.T
    return {"repulsion": similarities.square().mean(), "alignment": -2 * similarities.diagonal().mean()}


class Centred(nn.Module):
    """Cross-entropy to a target with a running mean, as in DINO."""

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("centre", torch.zeros(dim))

    def forward(self, z1, z2):
        self.centre.mul_(0.9).add_(z2.detach().mean(0), alpha=0.1)
        return -((z2.detach() - self.centre).softmax(1) * z1.log_softmax(1)).sum(1).mean()


def half_precision_loss(z1, z2):
    """Spectral contrastive loss of embeddings rounded to float16."""
    similarities = (z1.half() @ z2.half().T).double()
    return similarities.square().mean() - 2 * similarities.diagonal().mean()
