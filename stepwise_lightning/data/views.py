"""Two views of an image: fixed random crops, or a random augmentation for every sample and epoch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from stepwise_lightning.data.augmentation import AugmentationParameters
from stepwise_lightning.data.image_sets import ImageSet, channel_statistics
from stepwise_lightning.errors import UserError
from stepwise_lightning.seeding import hashed_seed, isolated_rng

if TYPE_CHECKING:  # importing this package needs only torch and lightning
    from PIL import Image
    from torchvision.transforms import v2

PROBE_EPOCH = -1  # not a training epoch: probe pairs share no random numbers with training


def crop_pairs(images: Tensor, num_pairs: int, crop_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return two independent random crops of each of ``num_pairs`` images, chosen without replacement.

    Pixels are normalised per channel with the statistics of all ``images``.

    Args:
        images: uint8, (N, 3, h, w).
        num_pairs: n ≤ N.
        crop_size: side of the square crops, ≤ min(h, w).
        seed: seed of the images and crop positions.

    Returns:
        First and second views, float32, (n, 3, crop_size, crop_size) each.

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


def random_views(
    augmentation: str, image_size: int, mean: Sequence[float], std: Sequence[float]
) -> tuple[v2.Transform, v2.Transform]:
    """Return transforms from one PIL image to its first and second view, float32, (3, image_size, image_size).

    Random resized crop, flip, and the other steps of :class:`.AugmentationParameters`, then normalisation. Call a
    transform on one image at a time: a batch would get one crop.

    Raises:
        ValueError: unknown augmentation.

    """
    from torchvision.transforms import v2

    parameters = AugmentationParameters.of(augmentation)
    crop = v2.RandomResizedCrop(image_size, scale=parameters.crop_scale, ratio=parameters.crop_ratio)
    steps: list[Any] = [crop, v2.RandomHorizontalFlip()]
    if not parameters.jitter:
        return (v2.Compose([*steps, _Normalise(mean, std)]),) * 2
    jitter = v2.RandomApply([v2.ColorJitter(*parameters.jitter)], p=parameters.jitter_probability)
    steps += [jitter, v2.RandomGrayscale(parameters.gray_probability)]
    views = []
    for blur, solarize in zip(parameters.blur_probability, parameters.solarize_probability, strict=True):
        last: list[Any] = [v2.RandomApply([_Blur(*parameters.blur_sigma)], p=blur)]
        last += [v2.RandomSolarize(128, solarize)] if solarize else []
        views.append(v2.Compose([*steps, *last, _Normalise(mean, std)]))
    return views[0], views[1]


def plain_view(image_size: int, mean: Sequence[float], std: Sequence[float]) -> v2.Transform:
    """Return a transform from one PIL image to its normalised centre crop, float32, (3, image_size, image_size)."""
    from torchvision.transforms import v2

    return v2.Compose([v2.Resize(image_size), v2.CenterCrop(image_size), _Normalise(mean, std)])


# At 32 and 96 pixels Pillow crops and jitters up to twice as fast as tensors, and blurs 2 to 8 times as fast as
# v2.GaussianBlur (the authors of Barlow Twins use it too); _Normalise takes a third of the time of v2's three steps.


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
    """Pairs (x, label) of an image set without augmentation; x is float32, (3, image_size, image_size)."""

    def __init__(self, images: ImageSet, transform: Callable[[Any], Tensor]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images.picture(index)), int(self.images.labels[index])


class TwoViews(Dataset[tuple[Tensor, Tensor, int]]):
    """Triples (x1, x2, label), indexed by (epoch, index); x1 and x2 are float32, (3, image_size, image_size).

    A view is a function of (seed, epoch, index, view), independent of process and order. The epoch is part of the key
    because persistent workers cannot obtain it otherwise.
    """

    def __init__(self, images: ImageSet, transforms: tuple[v2.Transform, v2.Transform], seed: int) -> None:
        self.images, self.transforms, self.seed = images, transforms, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, int]:
        epoch, index = key
        picture = self.images.picture(index)
        views = []
        for view, transform in enumerate(self.transforms, 1):
            # torchvision uses the global generator, which keeps 32 bits of its seed: two samples may, rarely and
            # without harm, share random numbers.
            with isolated_rng(hashed_seed(self.seed, epoch, index, view)):
                views.append(transform(picture))
        return views[0], views[1], int(self.images.labels[index])
