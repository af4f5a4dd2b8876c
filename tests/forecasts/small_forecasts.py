"""Small networks on two views with a decaying spectrum."""

from unittest import mock

import torch
from torch import nn

from stepwise_lightning import BarlowTwins, spectral_contrastive_loss
from stepwise_lightning.forecasts import learning_rates
from stepwise_lightning.modules import JointEmbedding

ANALYTICAL = {"off_diagonal_weight": 1.0, "normalize": False, "center": True}
PIXELS, DIM = 20, 4
# Fewer simulations of the stable learning rates, which take most of the time of a forecast of these networks.
COARSE_RATES = mock.patch.multiple(learning_rates, _STARTS=2, _STARTS_OF_FUNCTION=1, _FACTOR=1.4)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pairs(number, seed=0):
    """Return two views with a decaying spectrum, (number, PIXELS) each."""
    content = normal(number, PIXELS, seed=seed) * torch.logspace(0.3, -0.7, PIXELS)
    return [content + 0.2 * normal(number, PIXELS, seed=seed + k) for k in (1, 2)]


def batches(number=16, size=64):
    return [pairs(size, seed=10 * index) for index in range(number)]


def encoder(alpha=1e-3, seed=0):
    torch.manual_seed(seed)
    layers = [nn.Flatten(), nn.Linear(PIXELS, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(), nn.Linear(16, DIM)]
    with torch.no_grad():
        layers[-1].weight.mul_(alpha)
    return nn.Sequential(*layers)


def module(cls=BarlowTwins, alpha=1e-3, rate=0.02, **settings):
    return cls(encoder(alpha), rate, **((ANALYTICAL if cls is BarlowTwins else {}) | settings))


class WithAnyLoss(JointEmbedding):
    """Module with the loss and the driven matrix in attributes."""

    function = staticmethod(spectral_contrastive_loss)

    def loss_terms(self, z1, z2):
        return {"value": self.function(z1, z2)}
