"""Two views of an image: random crops drawn once, or an augmentation drawn anew for every sample and epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from stepwise_lightning.data.augmentation import AugmentationParameters
from stepwise_lightning.data.image_sets import ImageSet, channel_statistics
from stepwise_lightning.errors import UserError
from stepwise_lightning.seeding import hashed_seed

if TYPE_CHECKING:  # importing this package needs only torch and lightning
    from PIL import Image
    from torchvision.transforms import v2

PROBE_EPOCH = -1  # no training epoch has it, so that probe pairs share no draw with training


def crop_pairs(images: Tensor, num_pairs: int, crop_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw ``num_pairs`` images without repetition and return two independent random crops of each.

    Pixels are normalised per channel with the statistics of all ``images``.

    Args:
        images: uint8, (N, 3, h, w).
        num_pairs: n ≤ N.
        crop_size: side of the square crops, ≤ min(h, w).
        seed: of the choice of images and of the crops' positions.

    Returns:
        First and second views, float32, (n, 3, crop_size, crop_size) each.

    Raises:
        ValueError: ``num_pairs`` or ``crop_size`` out of range.

    """
    total, _, height, width = images.shape
    if not 1 <= num_pairs <= total:
        raise UserError(
            f"num_pairs: {num_pairs} pairs asked for, but the data set has {total} images: choose 1 to {total}"
        )
    if not 1 <= crop_size <= min(height, width):
        raise UserError(f"crop_size: crops of {crop_size}×{crop_size} do not fit the images of {height}×{width} pixels")
    mean, std = channel_statistics(images)
    generator = torch.Generator().manual_seed(seed)
    chosen = images[torch.randperm(total, generator=generator)[:num_pairs]]
    rows = torch.randint(height - crop_size + 1, (2, num_pairs), generator=generator)
    columns = torch.randint(width - crop_size + 1, (2, num_pairs), generator=generator)
    views = []
    for top, left in zip(rows.tolist(), columns.tolist(), strict=True):
        crops = [image[:, i : i + crop_size, j : j + crop_size] for image, i, j in zip(chosen, top, left, strict=True)]
        normalised = (torch.stack(crops) / 255.0 - mean[:, None, None]) / std[:, None, None]
        views.append(normalised.float())
    return views[0], views[1]


def random_view(augmentation: str, image_size: int, mean: Sequence[float], std: Sequence[float]) -> v2.Transform:
    """Return a transform from one PIL image to one random view, float32, (3, image_size, image_size).

    Random resized crop and flip, for ``standard`` also colour jitter, grayscale and blur, with the ranges and
    probabilities of :class:`.AugmentationParameters`; then normalisation. To be called on one image
    at a time: a batch would get one crop.

    Raises:
        ValueError: ``augmentation`` is neither ``standard`` nor ``weak``.

    """
    from torchvision.transforms import v2

    strengths = AugmentationParameters.of(augmentation)
    crop = v2.RandomResizedCrop(image_size, scale=strengths.crop_scale, ratio=strengths.crop_ratio)
    steps: list[Any] = [crop, v2.RandomHorizontalFlip()]
    if strengths.jitter:
        jitter = v2.ColorJitter(*strengths.jitter)
        steps += [
            v2.RandomApply([jitter], p=strengths.jitter_probability),
            v2.RandomGrayscale(strengths.gray_probability),
            v2.RandomApply([_Blur(*strengths.blur_sigma)], p=strengths.blur_probability),
        ]
    return v2.Compose([*steps, _Normalise(mean, std)])


def plain_view(image_size: int, mean: Sequence[float], std: Sequence[float]) -> v2.Transform:
    """Return a transform from one PIL image to its normalised centre, float32, (3, image_size, image_size)."""
    from torchvision.transforms import v2

    return v2.Compose([v2.Resize(image_size), v2.CenterCrop(image_size), _Normalise(mean, std)])


# Measured at 32 and 96 pixels: Pillow crops and jitters up to twice as fast as tensors, blurs 2 to 8 times as fast as
# v2.GaussianBlur (and is what the authors of Barlow Twins use); _Normalise takes a third of what v2's three steps take.


class _Blur:
    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def __call__(self, image: Image.Image) -> Image.Image:
        from PIL import ImageFilter

        return image.filter(ImageFilter.GaussianBlur(torch.empty(()).uniform_(self.low, self.high).item()))


class _Normalise:
    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = (255 * torch.tensor(value)[:, None, None] for value in (mean, std))

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return (pixels.view(image.height, image.width, 3).permute(2, 0, 1).contiguous() - self.mean).div_(self.std)


class PlainImages(Dataset[tuple[Tensor, int]]):
    """Pairs (x, label) of an image set, without augmentation: x is float32, (3, image_size, image_size)."""

    def __init__(self, images: ImageSet, transform: v2.Transform) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images.picture(index)), int(self.images.labels[index])


class TwoViews(Dataset[tuple[Tensor, Tensor, int]]):
    """Triples (x1, x2, label), addressed by (epoch, index); x1 and x2 are float32, (3, image_size, image_size).

    A view is a function of (seed, epoch, index, view) alone, whatever process draws it, and in whatever order. The
    epoch is part of the address because workers that outlive an epoch have no other way to learn it.
    """

    def __init__(self, images: ImageSet, transform: v2.Transform, seed: int) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, address: tuple[int, int]) -> tuple[Tensor, Tensor, int]:
        epoch, index = address
        picture = self.images.picture(index)
        # torchvision draws from the global generator, which is lent and given back. default_generator.manual_seed,
        # because torch.manual_seed takes 0.2 ms to seed accelerators too. The generator keeps 32 bits of its seed:
        # two samples may rarely share a draw, which does no harm.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(hashed_seed(self.seed, epoch, index, 1))
            x1 = self.transform(picture)
            torch.default_generator.manual_seed(hashed_seed(self.seed, epoch, index, 2))
            x2 = self.transform(picture)
        return x1, x2, int(self.images.labels[index])
