"""Fixed random crops of images, and views without augmentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from stepwise_lightning.data.image_files import channel_statistics
from stepwise_lightning.data.image_sets import ImageSet
from stepwise_lightning.errors import UserError
from stepwise_lightning.precision import on_float64_device

if TYPE_CHECKING:  # importing this package needs only torch and lightning
    from PIL import Image
    from torchvision.transforms import v2


def crop_pairs(images: Tensor, num_pairs: int, crop_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return two independent random crops of each of ``num_pairs`` images, chosen without replacement.

    Pixels are normalised per channel with the statistics of all ``images``.

    Args:
        images: uint8, (N, 3, h, w).
        num_pairs: n ≤ N.
        crop_size: side of the square crops, ≤ min(h, w).
        seed: seed of the images and crop positions.

    Returns:
        First and second views, float32, (n, 3, crop_size, crop_size) each, on the device of ``images``.

    Raises:
        ValueError: ``num_pairs`` or ``crop_size`` out of range.

    """
    total, _, height, width = images.shape
    if not 1 <= num_pairs <= total:
        raise UserError(f"num_pairs {num_pairs} does not fit a data set of {total} images: choose 1 to {total}")
    if not 1 <= crop_size <= min(height, width):
        raise UserError(
            f"crop_size {crop_size} does not fit images of {height}×{width} pixels: choose 1 to {min(height, width)}"
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.device("cpu"):
        order = torch.randperm(total, generator=generator)[:num_pairs]
        rows = torch.randint(height - crop_size + 1, (2, num_pairs), generator=generator)
        columns = torch.randint(width - crop_size + 1, (2, num_pairs), generator=generator)
    chosen = on_float64_device(images[order.to(images.device)])
    mean, std = (value.to(chosen.device) for value in channel_statistics(images))
    views = []
    for top, left in zip(rows.tolist(), columns.tolist(), strict=True):
        crops = [image[:, i : i + crop_size, j : j + crop_size] for image, i, j in zip(chosen, top, left, strict=True)]
        normalised = (torch.stack(crops) / 255.0 - mean[:, None, None]) / std[:, None, None]
        views.append(normalised.float().to(images.device))
    return views[0], views[1]


def plain_view(image_size: int, mean: Sequence[float], std: Sequence[float]) -> v2.Transform:
    """Return a transform from one PIL image to its normalised centre crop, float32, (3, image_size, image_size)."""
    from torchvision.transforms import v2

    return v2.Compose([v2.Resize(image_size), v2.CenterCrop(image_size), _Normalise(mean, std)])


class _Normalise:
    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = (255 * torch.tensor(value)[:, None, None] for value in (mean, std))

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return (pixels.view(image.height, image.width, 3).permute(2, 0, 1).contiguous() - self.mean).div_(self.std)


class PlainImages(Dataset[tuple[Tensor, int]]):
    """Pairs (x, label) of an image set without augmentation; x is float32, (3, image_size, image_size)."""

    def __init__(self, images: ImageSet, transform: Callable[[Any], Tensor]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture, label = self.images.sample(index)
        return self.transform(picture), label
