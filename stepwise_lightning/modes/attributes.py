"""Simple image attributes, and the share of a mode's variance that they explain."""

from __future__ import annotations

import torch
from torch import Tensor

from stepwise_lightning.precision import as_float64, float64_pair

_GRAY = (0.2989, 0.587, 0.114)  # weights of red, green and blue, as in torchvision
_FINE = 0.125  # cycles per pixel, a quarter of the Nyquist frequency
_CONSTANT = 1e-6  # smaller differences between images are round-off
# Definitions, shown on the page.
ATTRIBUTES = {
    "brightness": "mean of the gray image",
    "contrast": "standard deviation of the gray image",
    "saturation": "mean over pixels of the largest minus the smallest channel",
    "red − green": "mean of red minus green",
    "blue − yellow": "mean of blue minus the mean of red and green",
    "fine detail": "share of the gray image's spectral power above an eighth of a cycle per pixel",
}


def image_attributes(images: Tensor) -> dict[str, Tensor]:
    """Return :data:`ATTRIBUTES` of images (n, 3, h, w) with values in [0, 1]: (n,) each, float64."""
    images = as_float64(images, "the images")
    red, green, blue = images.unbind(1)
    gray = torch.einsum("c,ncij->nij", images.new_tensor(_GRAY), images)
    centred = gray - gray.mean((1, 2), keepdim=True)
    power = torch.fft.fft2(centred).abs().square()
    height, width = gray.shape[1:]
    rows, columns = (torch.fft.fftfreq(extent, device=images.device) for extent in (height, width))
    frequency = torch.hypot(rows[:, None], columns)
    total = power.sum((1, 2))
    fine = (power * (frequency > _FINE)).sum((1, 2))
    values = (
        gray.mean((1, 2)),
        centred.square().mean((1, 2)).sqrt(),
        (images.amax(1) - images.amin(1)).mean((1, 2)),
        (red - green).mean((1, 2)),
        (blue - (red + green) / 2).mean((1, 2)),
        torch.where(total > 1e-12, fine / total.clamp(min=1e-12), 0.0),
    )
    return dict(zip(ATTRIBUTES, values, strict=True))


def correlations(coordinates: Tensor, attribute: Tensor) -> Tensor:
    """Return Pearson's r of each mode, (n, k), with an attribute, (n,): (k,), NaN where either is constant."""
    coordinates, attribute = float64_pair(coordinates, attribute, "values")
    c, a = coordinates - coordinates.mean(0), attribute - attribute.mean()
    if a.abs().max() < _CONSTANT:  # for example colour of grayscale images
        return c.new_full((c.shape[1],), torch.nan)
    return (a @ c) / (a.norm() * c.norm(dim=0))


def explained_share(coordinates: Tensor, attributes: dict[str, Tensor]) -> Tensor:
    """Return the share of each mode's variance that all attributes explain in a linear regression, (k,).

    It is 1 − Σ(leave-one-out residual)² / Σ(c − c̄)²: unrelated attributes explain nothing, even with few images, and
    chance may make it negative.
    """
    coordinates = as_float64(coordinates, "the coordinates")
    attributes = {name: as_float64(values, name).to(coordinates.device) for name, values in attributes.items()}
    varying = [values for values in attributes.values() if values.std() > _CONSTANT]
    centred = coordinates - coordinates.mean(0)
    x = torch.stack([torch.ones_like(coordinates[:, 0]), *((v - v.mean()) / v.std() for v in varying)], 1)
    hat = x @ torch.linalg.pinv(x)
    left_out = (1 - hat.diagonal()).clamp(min=1e-9)[:, None]
    return 1 - ((centred - hat @ centred) / left_out).square().sum(0) / centred.square().sum(0)


def class_share(coordinates: Tensor, labels: Tensor) -> Tensor | None:
    """Return the share of each mode's variance between classes, (k,); None with fewer than two known classes.

    ε² = 1 − (1 − η²)(n − 1)/(n − classes), where η² is the variance of class means over the total variance. Without a
    relation its mean is 0, and it may be negative. Labels below 0 are unknown.
    """
    coordinates = as_float64(coordinates, "the coordinates")
    labels = labels.to(coordinates.device)
    known = labels >= 0
    c = coordinates[known] - coordinates[known].mean(0)
    names, groups, counts = labels[known].unique(return_inverse=True, return_counts=True)
    if len(names) < 2 or len(c) <= len(names):
        return None
    means = c.new_zeros(len(names), c.shape[1]).index_add_(0, groups, c) / counts[:, None]
    between = (counts[:, None] * means.square()).sum(0) / c.square().sum(0)
    return 1 - (1 - between) * (len(c) - 1) / (len(c) - len(names))
