"""``stepwise export RUN --out weights.pt|safetensors``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stepwise_lightning.commands.parser import Parser


def main(arguments: list[str]) -> None:
    """Write the ResNet of a run as a state dictionary for torchvision, with a model card beside safetensors."""
    parser = Parser("export", "Export the trained ResNet of a run as a state dictionary with torchvision's names, "
                    "without a classifier. FILE.safetensors also gets a model card, FILE.md.")  # fmt: skip
    parser.add_argument("run", metavar="RUN", help="folder of a run, runs/NAME/version_N, or a checkpoint in it")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE",
                        help="file to write, .safetensors, or .pt for torch.load; must not exist")  # fmt: skip
    options = parser.parse_args(arguments)
    card = options.out.with_suffix(".md") if options.out.suffix == ".safetensors" else None
    for path in filter(None, (options.out, card)):
        if path.exists():
            parser.error(f"--out {path} exists: name a new file")

    import torch

    from stepwise_lightning.commands.model_card import model_card
    from stepwise_lightning.errors import optional_import
    from stepwise_lightning.files import atomic_write, atomic_write_text
    from stepwise_lightning.trained import load_encoder, torchvision_weights

    safetensors: Any = optional_import("safetensors.torch") if card else None
    weights = torchvision_weights(options.run)
    code = _loading(load_encoder(options.run), options.out)
    if card:
        text = model_card(options.run, code)
        atomic_write(options.out, lambda partial: safetensors.save_file(weights, partial, {"format": "pt"}))
        atomic_write_text(card, text)
    else:
        atomic_write(options.out, lambda partial: torch.save(weights, partial))
    print(f"{options.out}: {len(weights)} tensors{f', described in {card}' if card else ''}; to load them:\n")
    print("\n".join(f"    {line}".rstrip() for line in code))


def _loading(encoder: Any, path: Path) -> list[str]:
    """Return Python code that loads the weights."""
    from stepwise_lightning.encoders import ResNet

    resnet = encoder if isinstance(encoder, ResNet) else encoder.backbone
    lines = ["import torch, torchvision", f"network = torchvision.models.{resnet.name}(weights=None)"]
    if resnet.name == "resnet_small":  # not in torchvision
        lines = ["import torch", "from stepwise_lightning import ResNet"]
        lines += [f'network = ResNet("resnet_small", {resnet.small_images}, width={resnet.width}).network']
    elif resnet.small_images:
        lines += ["network.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)  # the stem for small images"]
        lines += ["network.maxpool = torch.nn.Identity()"]
    lines += ["network.fc = torch.nn.Identity()  # or use strict=False below, and your own classifier"]
    if path.suffix == ".safetensors":
        return ["from safetensors.torch import load_file", *lines, f'network.load_state_dict(load_file("{path}"))']
    return [*lines, f'network.load_state_dict(torch.load("{path}", weights_only=True))']
