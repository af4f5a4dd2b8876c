"""``stepwise export RUN --out weights.pt``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stepwise_lightning.commands.parser import Parser

__all__ = ["main"]


def main(arguments: list[str]) -> None:
    """Write the ResNet of a run as a state dictionary for torchvision."""
    parser = Parser("export", "Export the trained ResNet of a run as a state dictionary with torchvision's names, "
                    "without a classifier.")  # fmt: skip
    parser.add_argument("run", metavar="RUN", help="folder of a run, runs/NAME/version_N, or a checkpoint in it")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.pt", help="file to write; must not exist")
    options = parser.parse_args(arguments)
    if options.out.exists():
        parser.error(f"--out {options.out} exists: name a new file")

    import torch

    from stepwise_lightning.files import atomic_write
    from stepwise_lightning.trained import load_encoder, torchvision_weights

    weights = torchvision_weights(options.run)
    atomic_write(options.out, lambda partial: torch.save(weights, partial))
    print(f"{options.out}: {len(weights)} tensors; to load them:\n")
    print("\n".join(f"    {line}".rstrip() for line in _loading(load_encoder(options.run), options.out)))


def _loading(encoder: Any, path: Path) -> list[str]:
    """Return Python code that loads the weights."""
    from stepwise_lightning.encoders import ResNet

    resnet = encoder if isinstance(encoder, ResNet) else encoder.backbone
    lines = ["import torch, torchvision", f"network = torchvision.models.{resnet.name}(weights=None)"]
    if resnet.name == "resnet_small":  # not in torchvision
        lines = ["import torch", "from stepwise_lightning import ResNet"]
        lines += [f'network = ResNet("resnet_small", small_images={resnet.small_images}).network']
    elif resnet.small_images:
        lines += ["network.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)  # the stem for small images"]
        lines += ["network.maxpool = torch.nn.Identity()"]
    lines += ["network.fc = torch.nn.Identity()  # or use strict=False below, and your own classifier"]
    return [*lines, f'network.load_state_dict(torch.load("{path}", weights_only=True))']
