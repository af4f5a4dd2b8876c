"""What can be said of an image without a network, and how much of a mode that explains."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ATTRIBUTES", "class_share", "correlations", "explained_share", "image_attributes"]

_GRAY = (0.2989, 0.587, 0.114)  # weights of red, green and blue, as in the augmentation
_FINE = 0.125  # cycles per pixel: a quarter of what a pixel grid can show
_CONSTANT = 1e-6  # what differs by less between images is round-off
# What each is, for readers.
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
    images = images.double()
    red, green, blue = images.unbind(1)
    gray = torch.einsum("c,ncij->nij", torch.tensor(_GRAY, dtype=torch.float64), images)
    centred = gray - gray.mean((1, 2), keepdim=True)
    power = torch.fft.fft2(centred).abs().square()
    height, width = gray.shape[1:]
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None])
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
    c, a = coordinates - coordinates.mean(0), attribute - attribute.mean()
    if a.abs().max() < _CONSTANT:  # as colour is in grayscale images
        return torch.full((c.shape[1],), torch.nan, dtype=torch.float64)
    return (a @ c) / (a.norm() * c.norm(dim=0))


def explained_share(coordinates: Tensor, attributes: dict[str, Tensor]) -> Tensor:
    """Return how much of each mode's variance all attributes together explain, linearly, (k,).

    That is 1 − Σ(left-out residual)² / Σ(c − c̄)²: each image is predicted by the others, so that attributes that say
    nothing explain nothing however few the images are, but for chance, which may make it negative.
    """
    known = [values for values in attributes.values() if values.std() > _CONSTANT]
    centred = coordinates - coordinates.mean(0)
    x = torch.stack([torch.ones_like(coordinates[:, 0]), *((v - v.mean()) / v.std() for v in known)], 1)
    hat = x @ torch.linalg.pinv(x)
    own = (1 - hat.diagonal()).clamp(min=1e-9)[:, None]
    return 1 - ((centred - hat @ centred) / own).square().sum(0) / centred.square().sum(0)


def class_share(coordinates: Tensor, labels: Tensor) -> Tensor | None:
    """Return how much of each mode's variance lies between classes, (k,); None with fewer than two known classes.

    ε² = 1 − (1 − η²)(n − 1)/(n − classes), with η² the variance of class means over all: without a relation it is 0 in
    the mean, and perhaps below. Labels below 0 are unknown.
    """
    known = labels >= 0
    c = coordinates[known] - coordinates[known].mean(0)
    names, groups, counts = labels[known].unique(return_inverse=True, return_counts=True)
    if len(names) < 2 or len(c) <= len(names):
        return None
    means = torch.zeros(len(names), c.shape[1], dtype=c.dtype).index_add_(0, groups, c) / counts[:, None]
    between = (counts[:, None] * means.square()).sum(0) / c.square().sum(0)
    return 1 - (1 - between) * (len(c) - 1) / (len(c) - len(names))
