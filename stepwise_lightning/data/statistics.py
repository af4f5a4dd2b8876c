"""Channel statistics of images, from counts of their levels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stepwise_lightning.data.image_files import pixels
from stepwise_lightning.data.stl10 import JoinedImages
from stepwise_lightning.errors import UserError

if TYPE_CHECKING:  # importing this package needs only torch and lightning
    from PIL import Image

NUM_FOR_STATISTICS = 1000  # images read for the statistics of a set that is not held in memory


def channel_statistics(images: Tensor | JoinedImages) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel of uint8 images (N, 3, h, w) in [0, 1].

    They are float64, (3,) each, on the CPU.
    """
    return level_statistics(_histogram(images))


def _histogram(images: Tensor | JoinedImages) -> Tensor:
    # In chunks, because bincount converts to int64 and STL-10 has 2.9 GB.
    chunks = (chunk.transpose(0, 1).flatten(1) for chunk in images.split(4096))
    counts = (torch.stack([c.bincount(minlength=256) for c in chunk]).cpu() for chunk in chunks)
    return sum(counts, torch.zeros(3, 256, dtype=torch.int64, device="cpu"))


def picture_levels(pictures: Iterable[Image.Image]) -> Tensor:
    """Return how often RGB images of any sizes have each level, (3, 256)."""
    return sum((_histogram(pixels(picture)[None]) for picture in pictures), torch.zeros(3, 256, device="cpu"))


def level_statistics(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return :func:`channel_statistics` for the number of pixels at each level, (3, 256)."""
    levels = torch.arange(256, dtype=torch.float64, device="cpu") / 255
    share = counts.double() / counts.sum(1, keepdim=True)
    mean = share @ levels
    std = (share @ levels.square() - mean.square()).clamp(min=0).sqrt()
    if (std < 1e-6).any():
        raise UserError(
            "a colour channel is constant over the whole data set and cannot be normalised: use other images"
        )
    return mean, std
