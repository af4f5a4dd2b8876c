"""Views of an image that differ in one parameter of the augmentation, and the invariance of modes to it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stepwise_lightning.data import batch_operations as operations
from stepwise_lightning.data.augmentation import AugmentationParameters

_GRID = 4  # levels of the position and size of a crop
_LEVELS = 3  # of the other parameters, at the middles of the thirds of their range


def parameter_ranges(parameters: AugmentationParameters) -> dict[str, str]:
    """Return the range of each parameter of an augmentation, in words."""
    low, high = parameters.crop_scale
    ranges = {
        "crop position": "four places around the middle",
        "crop size": f"{low:g} to {high:g} of the area",
        "crop shape": f"width over height {parameters.crop_ratio[0]:.2g} to {parameters.crop_ratio[1]:.2g}",
        "flip": "mirrored or not",
    }
    if parameters.jitter:
        brightness, contrast, saturation, hue = parameters.jitter
        ranges |= {
            "brightness": f"times 1 ± {brightness:g}",
            "contrast": f"times 1 ± {contrast:g}",
            "saturation": f"times 1 ± {saturation:g}",
            "hue": f"turned by ± {hue:g} of the circle",
            "grayscale": "colour or not",
            "blur": f"none, or a Gaussian of σ up to {parameters.blur_sigma[1]:g} pixels",
        }
    return ranges


def varied_views(image: Tensor, parameters: AugmentationParameters, size: int) -> dict[str, Tensor]:
    """Return views of one image by the parameter that differs; otherwise they equal the central crop.

    The central crop is a square with the mean area of the augmentation. Parameters take fixed values, at the middles of
    equal parts of their range. Views of an image, uint8, (3, h, w), are (levels, 3, size, size) with values in [0, 1],
    by the names of :func:`parameter_ranges`.
    """
    crops = _crops(parameters, *image.shape[1:])
    tops, lefts, heights, widths = torch.tensor([box for boxes in crops.values() for box in boxes]).T
    flips = torch.tensor(
        [name == "flip" and index == 1 for name, boxes in crops.items() for index in range(len(boxes))]
    )
    rows = operations.Taps.of_crops(tops, heights, image.shape[1], size, factor=1 / 255)
    columns = operations.Taps.of_crops(lefts, widths, image.shape[2], size, flip=flips)
    planes = operations.resized_crops(image.expand(len(tops), -1, -1, -1), rows, columns)
    views = dict(zip(crops, planes.transpose(0, 1).split([len(boxes) for boxes in crops.values()]), strict=True))
    if parameters.jitter:
        views |= _recolour(views["flip"][:1], parameters)
    return views


def _crops(parameters: AugmentationParameters, height: int, width: int) -> dict[str, list[tuple[int, int, int, int]]]:
    """Return boxes (top, left, height, width) by the parameter that differs."""
    low, high = parameters.crop_scale
    mean = (low + high) / 2 * height * width

    def box(area: float, ratio: float = 1.0, top: float = 0.5, left: float = 0.5) -> tuple[int, int, int, int]:
        high, wide = min(height, round(math.sqrt(area / ratio))), min(width, round(math.sqrt(area * ratio)))
        if ratio == 1.0:
            high = wide = min(high, wide)
        high, wide = max(high, 1), max(wide, 1)
        return int((height - high) * top), int((width - wide) * left), high, wide

    ratios = [math.log(ratio) for ratio in parameters.crop_ratio]
    return {
        "crop position": [box(mean, 1.0, top, left) for top in (0.25, 0.75) for left in (0.25, 0.75)],
        "crop size": [box((low + (high - low) * part) * height * width) for part in _middles(_GRID)],
        "crop shape": [box(mean, math.exp(ratios[0] + (ratios[1] - ratios[0]) * part)) for part in _middles(_LEVELS)],
        "flip": [box(mean), box(mean)],
    }


def _middles(levels: int) -> list[float]:
    return [(level + 0.5) / levels for level in range(levels)]


def _recolour(view: Tensor, parameters: AugmentationParameters) -> dict[str, Tensor]:
    """Return a view (1, 3, size, size) with changed colours or sharpness, by the parameter that differs."""
    assert parameters.jitter is not None
    order = torch.arange(4).expand(_LEVELS, 4)
    change = torch.tensor([2 * part - 1 for part in _middles(_LEVELS)], dtype=torch.float64)
    views = {}
    names = ("brightness", "contrast", "saturation", "hue")
    for index, (name, strength) in enumerate(zip(names, parameters.jitter, strict=True)):
        factors, hue = torch.ones(_LEVELS, 3, dtype=torch.float64), torch.zeros(_LEVELS, dtype=torch.float64)
        (hue if name == "hue" else factors[:, index]).add_(strength * change)
        planes = view.expand(_LEVELS, -1, -1, -1).transpose(0, 1).clone()
        views[name] = operations.jitter(planes, operations.Jitters.of(factors, hue, order)).transpose(0, 1)
    gray = operations.grayscale(view.transpose(0, 1).clone(), torch.tensor([0])).transpose(0, 1)
    low, high = parameters.blur_sigma
    sigma = torch.tensor([low + (high - low) * part for part in _middles(2)], dtype=torch.float64)
    blurred = operations.blur(view.expand(2, -1, -1, -1).transpose(0, 1).contiguous(), sigma).transpose(0, 1)
    return views | {"grayscale": torch.cat([view, gray]), "blur": torch.cat([view, blurred])}


def invariance(coordinates: Tensor) -> Tensor:
    """Return the share of variance between images, not between views of an image: (n, views, k) -> (k,), in [0, 1].

    For views at fixed values of a parameter: 1 if the mode is invariant to it, 0 if it depends on nothing else.
    """
    centred = coordinates - coordinates.mean((0, 1))
    return centred.mean(1).square().mean(0) / centred.square().mean((0, 1))


def intraclass_correlation(coordinates: Tensor) -> Tensor:
    """Return the intraclass correlation of random views (Fisher 1925): (n, views, k) -> (k,).

    It estimates the share of variance between images as (B − W) / (B + (views − 1) W), where B and W are the mean
    squares between and within images. If views of an image are no more similar than views of different images, its mean
    is 0 and it may be negative.
    """
    n, views = coordinates.shape[:2]
    means = coordinates.mean(1)
    between = views * (means - means.mean(0)).square().sum(0) / (n - 1)
    within = (coordinates - means[:, None]).square().sum((0, 1)) / (n * (views - 1))
    return (between - within) / (between + (views - 1) * within)
