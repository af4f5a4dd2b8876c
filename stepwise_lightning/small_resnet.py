"""ResNet for CPUs."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["small_resnet"]


def small_resnet() -> nn.Module:
    """Return a ResNet with four stages of one basic block, 8 to 64 channels, and a classifier ``fc``."""
    from torchvision.models.resnet import BasicBlock
    from torchvision.models.resnet import ResNet as TorchvisionResNet

    network: Any = TorchvisionResNet(BasicBlock, [1, 1, 1, 1])
    # torchvision fixes the width of the first stage at 64: rebuild the stages from 8 channels.
    network.inplanes = 8
    network.conv1 = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False)
    network.bn1 = nn.BatchNorm2d(8)
    for index, width in enumerate((8, 16, 32, 64)):
        setattr(network, f"layer{index + 1}", network._make_layer(BasicBlock, width, 1, stride=1 if index == 0 else 2))
    network.fc = nn.Linear(64, 1)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return network
