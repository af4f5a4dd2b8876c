"""LightningModules of another package: with and without ``encoder.backbone``, and without ``forward``."""

import lightning as L
import torch
from torch import nn


class Mine(L.LightningModule):
    """A network that is not called ``encoder``, and a loss outside of this package."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        z1, z2 = self(batch[0]), self(batch[1])
        return (z1 - z2).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.07, 0.5)


class WithEncoder(Mine):
    """The network has a second name, ``encoder``."""

    def __init__(self):
        super().__init__()
        self.encoder = self.net


class WithBackbone(Mine):
    """The network is ``encoder.backbone``."""

    def __init__(self):
        super().__init__()
        del self.net
        self.encoder = nn.Sequential(nn.Flatten())
        self.encoder.add_module("backbone", nn.Linear(48, 3))

    def forward(self, x):
        return self.encoder(x)


class WithoutForward(L.LightningModule):
    """The network is used in the training step only."""

    configure_optimizers = Mine.configure_optimizers

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0]) - self.net(batch[1])).square().mean()
