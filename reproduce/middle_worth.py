"""Classify CIFAR-10 from the modes of the middle-scale networks: ``python -m reproduce.middle_worth OUT``.

OUT is the output folder of ``python -m reproduce middle_scale``. The script embeds evenly spaced held-out images with
each network, and prints the leave-one-out accuracy of a ridge classifier on the first k modes
(:func:`stepwise_lightning.modes.mode_worth`) of the covariance of the embedding and of the hidden representation, for
trained and untrained networks, and of the pixels. Batch normalisation uses its running statistics; in the untrained
network, the batch statistics of these images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from reproduce.networks.variants import LOSS_SETTINGS
from stepwise_lightning.data.views import plain_view
from stepwise_lightning.features import capture
from stepwise_lightning.modes import mode_worth
from stepwise_lightning.modes.images import choose_images
from stepwise_lightning.runs.saved import checkpoint_of, configured_encoder
from stepwise_lightning.trained import input_settings, load_encoder

HIDDEN = "backbone"
NUM_MODES = (0, 1, 3, 6, 10, 100)


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser("python -m reproduce.middle_worth", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="output folder of middle_scale")
    parser.add_argument("--images", type=int, default=1000, help="number of held-out images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the runs (default: %(default)s)")
    options = parser.parse_args(arguments)
    runs = {loss: options.out / "runs" / f"{loss}_small_seed{options.seed}" / "version_0" for loss in LOSS_SETTINGS}
    checkpoint = checkpoint_of(runs["barlow_twins"])
    settings = input_settings(checkpoint)
    view = plain_view(settings["image_size"], settings["mean"], settings["std"])
    readers, labels, _, _ = choose_images(checkpoint, None, None, options.images)
    x = torch.stack([view(read()) for read in readers])
    print("| accuracy on k components |", " | ".join(f"{k}" for k in NUM_MODES), "|")
    print("|---" * (len(NUM_MODES) + 1) + "|")
    for loss, run in runs.items():
        for name, z in _representations(load_encoder(run), x).items():
            print(_row(f"{LOSS_SETTINGS[loss].title}, {name}", z, labels), flush=True)
    for name, z in _representations(configured_encoder(checkpoint).train(), x).items():
        print(_row(f"untrained, {name}", z, labels), flush=True)
    print(_row("pixels", x.flatten(1), labels))


def _representations(encoder: nn.Module, x: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        captured = capture(encoder, [x], ["", HIDDEN])
    return {"embedding": captured[""][0], "hidden representation": captured[HIDDEN][0]}


def _row(name: str, z: Tensor, labels: Tensor) -> str:
    accuracies = mode_worth(z, labels, num_modes=max(NUM_MODES))
    cells = [f"{float(accuracies[k]):.2f}" if k < len(accuracies) else "" for k in NUM_MODES]
    return " | ".join(["| " + name, *cells, ""]).rstrip()


if __name__ == "__main__":
    main()
