"""Views of an image that differ in one parameter of the augmentation alone, and how much of a mode survives that."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stepwise_lightning.data import batch_operations as operations
from stepwise_lightning.data.augmentation import AugmentationParameters

__all__ = ["parameters", "shared_by_views", "unchanged_share", "varied_views"]

_GRID = 4  # levels of a crop's place and size
_LEVELS = 3  # of the other parameters: at the middles of the thirds of their range


def parameters(strengths: AugmentationParameters) -> dict[str, str]:
    """Return the parameters that an augmentation draws, and what each is varied over."""
    low, high = strengths.crop_scale
    names = {
        "crop position": "four places around the middle",
        "crop size": f"{low:g} to {high:g} of the area",
        "crop shape": f"width over height {strengths.crop_ratio[0]:.2g} to {strengths.crop_ratio[1]:.2g}",
        "flip": "mirrored or not",
    }
    if strengths.jitter:
        brightness, contrast, saturation, hue = strengths.jitter
        names |= {
            "brightness": f"times 1 ± {brightness:g}",
            "contrast": f"times 1 ± {contrast:g}",
            "saturation": f"times 1 ± {saturation:g}",
            "hue": f"turned by ± {hue:g} of the circle",
            "grayscale": "colour or not",
            "blur": f"none, or a Gaussian of σ up to {strengths.blur_sigma[1]:g} pixels",
        }
    return names


def varied_views(image: Tensor, strengths: AugmentationParameters, size: int) -> dict[str, Tensor]:
    """Return views of one image by the parameter in which they differ, all else being that of the middle crop.

    The middle crop is square, of the mean area that the augmentation draws. Parameters take fixed values, at the
    middles of equal parts of their range.

    Args:
        image: uint8, (3, h, w).
        strengths: of the augmentation.
        size: side of the views in pixels.

    Returns:
        By :func:`parameters`, (levels, 3, size, size) with values in [0, 1].

    """
    crops = _crops(strengths, *image.shape[1:])
    tops, lefts, heights, widths = torch.tensor([box for boxes in crops.values() for box in boxes]).T
    flips = torch.tensor(
        [name == "flip" and index == 1 for name, boxes in crops.items() for index in range(len(boxes))]
    )
    rows = operations.Taps.of_crops(tops, heights, image.shape[1], size, factor=1 / 255)
    columns = operations.Taps.of_crops(lefts, widths, image.shape[2], size, flip=flips)
    planes = operations.resized_crops(image.expand(len(tops), -1, -1, -1), rows, columns)
    views = dict(zip(crops, planes.transpose(0, 1).split([len(boxes) for boxes in crops.values()]), strict=True))
    if strengths.jitter:
        views |= _recoloured(views["flip"][:1], strengths)
    return views


def _crops(strengths: AugmentationParameters, height: int, width: int) -> dict[str, list[tuple[int, int, int, int]]]:
    """Return boxes (top, left, height, width) by the parameter of the crop in which they differ."""
    low, high = strengths.crop_scale
    mean = (low + high) / 2 * height * width

    def box(area: float, ratio: float = 1.0, down: float = 0.5, right: float = 0.5) -> tuple[int, int, int, int]:
        high, wide = min(height, round(math.sqrt(area / ratio))), min(width, round(math.sqrt(area * ratio)))
        if ratio == 1.0:
            high = wide = min(high, wide)
        high, wide = max(high, 1), max(wide, 1)
        return int((height - high) * down), int((width - wide) * right), high, wide

    ratios = [math.log(ratio) for ratio in strengths.crop_ratio]
    return {
        "crop position": [box(mean, 1.0, down, right) for down in (0.25, 0.75) for right in (0.25, 0.75)],
        "crop size": [box((low + (high - low) * part) * height * width) for part in _middles(_GRID)],
        "crop shape": [box(mean, math.exp(ratios[0] + (ratios[1] - ratios[0]) * part)) for part in _middles(_LEVELS)],
        "flip": [box(mean), box(mean)],
    }


def _middles(levels: int) -> list[float]:
    return [(level + 0.5) / levels for level in range(levels)]


def _recoloured(view: Tensor, strengths: AugmentationParameters) -> dict[str, Tensor]:
    """Return views of other colours or sharpness of a view (1, 3, size, size)."""
    assert strengths.jitter is not None
    order = torch.arange(4).expand(_LEVELS, 4)
    change = torch.tensor([2 * part - 1 for part in _middles(_LEVELS)], dtype=torch.float64)
    views = {}
    for place, (name, strength) in enumerate(
        zip(("brightness", "contrast", "saturation", "hue"), strengths.jitter, strict=True)
    ):
        factors, hue = torch.ones(_LEVELS, 3, dtype=torch.float64), torch.zeros(_LEVELS, dtype=torch.float64)
        (hue if name == "hue" else factors[:, place]).add_(strength * change)
        planes = view.expand(_LEVELS, -1, -1, -1).transpose(0, 1).clone()
        views[name] = operations.jitter(planes, operations.Jitters.of(factors, hue, order)).transpose(0, 1)
    gray = operations.grayscale(view.transpose(0, 1).clone(), torch.tensor([0])).transpose(0, 1)
    low, high = strengths.blur_sigma
    sigma = torch.tensor([low + (high - low) * part for part in _middles(2)], dtype=torch.float64)
    blurred = operations.blur(view.expand(2, -1, -1, -1).transpose(0, 1).contiguous(), sigma).transpose(0, 1)
    return views | {"grayscale": torch.cat([view, gray]), "blur": torch.cat([view, blurred])}


def unchanged_share(coordinates: Tensor) -> Tensor:
    """Return the share of variance that is between images, not between views of one: (n, views, k) to (k,), in [0, 1].

    Of views at fixed values of a parameter: 1 where the mode is blind to it, 0 where it tells nothing else.
    """
    centred = coordinates - coordinates.mean((0, 1))
    return centred.mean(1).square().mean(0) / centred.square().mean((0, 1))


def shared_by_views(coordinates: Tensor) -> Tensor:
    """Return the intraclass correlation of random views, (n, views, k) to (k,): the same share, among all such views.

    (B − W) / (B + (views − 1) W), with B and W the mean squares between and within images: 0 in the mean, and perhaps
    below, where views of one image are no more alike than those of different ones (Fisher 1925).
    """
    n, views = coordinates.shape[:2]
    means = coordinates.mean(1)
    between = views * (means - means.mean(0)).square().sum(0) / (n - 1)
    within = (coordinates - means[:, None]).square().sum((0, 1)) / (n * (views - 1))
    return (between - within) / (between + (views - 1) * within)
