"""Sensitivity of modes to pixels: mean gradients and occlusion maps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from stepwise_lightning.modes.directions import Modes

_BATCH = 64


def mean_gradients(encoder: nn.Module, modes: Modes, inputs: Tensor) -> Tensor:
    """Return the gradient of each mode's coordinate with respect to the input, averaged over inputs, (k, *input).

    To first order it is the small pattern that, added to all inputs, raises the mode most. For a linear encoder it is
    the mode itself. The encoder is in evaluation mode.
    """
    total = modes.directions.new_zeros(len(modes), *inputs.shape[1:])
    for part in inputs.split(_BATCH):
        x = part.clone().requires_grad_()
        with torch.enable_grad():
            sums = modes.coordinates(encoder(x)).sum(0)
            for mode, value in enumerate(sums):
                total[mode] += torch.autograd.grad(value, x, retain_graph=True)[0].sum(0).to(total.device)
    return total / len(inputs)


@torch.no_grad()
def occlusion_maps(
    encoder: nn.Module, modes: Modes, images: Tensor, progress: Callable[[Iterable[Any]], Iterable[Any]] = iter
) -> Tensor:
    """Return the contribution of each pixel of an image to each mode, (n, k, h, w), float64.

    A square of a quarter of the image's side is covered with the mean colour of the training images, in steps of half a
    square. The value of a pixel is the decrease of the coordinate, averaged over the squares that cover the pixel
    (Zeiler and Fergus 2014). Images, (n, c, h, w), are normalised, and the encoder is in evaluation mode. ``progress``
    wraps the loop over positions.
    """
    height, width = images.shape[2:]
    side = max(1, round(min(height, width) / 4))
    tops, lefts = (sorted({*range(0, extent - side, max(1, side // 2)), extent - side}) for extent in (height, width))
    whole = torch.cat([modes.coordinates(encoder(part)) for part in images.split(_BATCH)])
    lost, covers = (whole.new_zeros(*shape, height, width) for shape in (whole.shape, ()))
    for top, left in progress([(top, left) for top in tops for left in lefts]):
        place = slice(top, top + side), slice(left, left + side)
        covered = images.clone()
        covered[:, :, place[0], place[1]] = 0
        coordinates = torch.cat([modes.coordinates(encoder(part)) for part in covered.split(_BATCH)])
        lost[:, :, place[0], place[1]] += (whole - coordinates)[..., None, None]
        covers[place] += 1
    return lost / covers
