"""Crop, colour jitter, grayscale, blur and solarisation of a batch of images, with parameters for each image.

The functions work on planes: float32, (3, n, h, w), values in [0, 1], one contiguous block per colour channel. They use
sums of a few terms in a fixed order and no matrix products: the result for an image is independent of the rest of the
batch, of the BLAS library and of TF32.

Definitions follow torchvision's transforms v2 on floats; the blur follows Pillow.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, prod
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from stepwise_lightning.asynchronous import to_device

_GRAY = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green and blue
_MAX_HUE = 1 / 2
_MAX_SIGMA = 2.0  # the boxes of the blur then reach two pixels
_NUM_BOXES = 3  # Pillow's number of passes
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


class Taps(NamedTuple):
    """Indices and weights of the input lines (rows or columns) that are summed into each output line."""

    lines: Tensor  #: int64, (n, size, taps)
    weights: Tensor  #: float32, (n, size, taps)

    @classmethod
    def of_crops(
        cls,
        start: Tensor,
        length: Tensor,
        extent: int | Tensor,
        size: int,
        flip: Tensor | None = None,
        factor: float = 1.0,
    ) -> Taps:
        """Return the taps of crops resized with the antialiased triangle filter of Pillow and torchvision.

        ``start`` and ``length``, int64, (n,), are the lines of each crop, ``extent`` the lines of the images: equal for
        all, or float64, (n,). It determines the number of taps, and with it the rounding of the weights. ``flip``,
        bool, (n,), reverses the ``size`` lines of the output, and ``factor`` multiplies all weights.
        """
        flip = torch.zeros(len(start), dtype=torch.bool) if flip is None else flip
        if isinstance(extent, int):
            return cls._triangles(start, length, ceil(2 * max(1.0, extent / size)), size, flip, factor)
        counts = (2 * (extent / size).clamp(min=1)).ceil().long()
        lines = torch.zeros(len(start), size, int(counts.max()), dtype=torch.int64)
        weights = torch.zeros(lines.shape, dtype=torch.float32)
        for count in counts.unique().tolist():
            chosen = counts == count
            taps = cls._triangles(start[chosen], length[chosen], count, size, flip[chosen], factor)
            lines[chosen, :, :count], weights[chosen, :, :count] = taps
        return cls(lines, weights)

    @classmethod
    def _triangles(cls, start: Tensor, length: Tensor, count: int, size: int, flip: Tensor, factor: float) -> Taps:
        start, length = start.float()[:, None, None], length.float()[:, None, None]
        place = torch.arange(size, dtype=torch.float32)[:, None]
        place = torch.where(flip[:, None, None], size - 1 - place, place)
        scale = length / size
        support = scale.clamp(min=1.0)
        centre = (place + 0.5) * scale
        offsets = (centre - support + 0.5).floor_().clamp_(min=0) + torch.arange(count)
        weights = (offsets - (centre - 0.5)).div_(support).abs_().neg_().add_(1).clamp_(min=0)
        weights.masked_fill_(offsets >= length, 0.0)
        weights.mul_(factor / weights.sum(-1, keepdim=True))
        # Taps beyond the crop have weight zero, but their index must be valid.
        return cls(torch.minimum(offsets, length - 1).add_(start).long(), weights)

    def of_images(self, images: slice, count: int | None = None) -> Taps:
        """Return the taps, or their first ``count``, of a slice of the images."""
        return Taps(self.lines[images, :, :count], self.weights[images, :, :count])

    def counts(self) -> list[int]:
        """Return the number of taps of each image without the last ones that have weight zero."""
        return (self.weights.amax(1).sign() * torch.arange(1, self.weights.shape[2] + 1)).amax(1).int().tolist()

    def summed(self, table: Tensor, times: int = 1) -> Tensor:
        """Return weighted sums of the lines of a table (n · extent, …), as (n · size, …); applied ``times`` times."""
        count, size, taps = self.lines.shape
        lines, weights = (to_device(values, table.device) for values in (self.lines, self.weights))
        lines = lines + len(table) // count * torch.arange(count, device=table.device)[:, None, None]
        lines, weights = (values.reshape(count * size, taps) for values in (lines, weights))
        for _ in range(times):
            table = embedding_bag(lines, table, mode="sum", per_sample_weights=weights)
        return table


def resized_crops(images: Tensor, rows: Taps, columns: Taps) -> Tensor:
    """Return the crops of images (n, 3, h, w), with levels 0 to 255, as planes; the taps are on the CPU."""
    count, _, height, width = images.shape
    table = images.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    table = rows.summed(table.view(count * height, 3 * width))
    table = table.view(count, -1, 3, width).transpose(1, 3).contiguous()
    table = columns.summed(table.view(count * width, -1))
    return table.view(count, columns.lines.shape[1], 3, -1).permute(2, 0, 3, 1).contiguous()


def resized_regions(regions: Sequence[Tensor], rows: Taps, columns: Taps, max_floats: int) -> Tensor:
    """Resize regions of different sizes, uint8, (3, h, w) each, to planes, as :func:`resized_crops` does for one size.

    They are padded to one size in groups of at most ``max_floats`` values, and at least one region.
    """
    heights, widths = ([region.shape[axis] for region in regions] for axis in (1, 2))
    num_rows, num_columns = rows.counts(), columns.counts()
    size, device = 3 * max(heights) * max(widths), regions[0].device
    group, planes = max(1, max_floats // size), []
    scratch = torch.empty(min(group, len(regions)) * size, dtype=torch.float32, device=device)
    for start in range(0, len(regions), group):
        part = slice(start, start + group)
        shape = len(regions[part]), max(heights[part]), 3, max(widths[part])
        table = scratch[: prod(shape)].view(shape)
        for row, region, height, width in zip(table, regions[part], heights[part], widths[part], strict=True):
            row[:height, :, :width] = region.transpose(0, 1)  # no tap refers to the rest
        taps = rows.of_images(part, max(num_rows[part])), columns.of_images(part, max(num_columns[part]))
        planes.append(resized_crops(table.transpose(1, 2), *taps))
    return torch.cat(planes, 1)


class Jitters(NamedTuple):
    """Colour jitter of each image, on the CPU, sorted by the turn of the hue.

    Brightness, contrast and saturation are clamp(f x + (1 − f) y), where y is black, the mean of the gray image, or the
    gray image.
    """

    image: Tensor  #: coefficients of x in each of four turns, float32, (n, 4)
    mean: Tensor  #: of the mean
    gray: Tensor  #: of the gray image
    hue: Tensor  #: shift of the hue in sextants, float32, (n,)
    hue_turn: Tensor  #: turn in which the hue is shifted, int64, (n,)

    @classmethod
    def of(cls, factors: Tensor, hue: Tensor, order: Tensor) -> Self:
        """Return the coefficients for the parameters of torchvision's ColorJitter.

        ``factors`` are of brightness, contrast and saturation, float64, (n, 3), ``hue`` is a share of the circle, (n,),
        and ``order`` a permutation of BRIGHTNESS, …, HUE, int64, (n, 4), with rows sorted by the turn of HUE.
        """
        hue_turn = (order == HUE).long().argmax(1)
        assert (hue.abs() <= _MAX_HUE).all()
        assert (hue_turn.diff() >= 0).all()
        image = factors.gather(1, order.clamp(max=HUE - 1))
        mean, gray = (1 - image) * (order == CONTRAST), (1 - image) * (order == SATURATION)
        return cls(image.float(), mean.float(), gray.float(), (6 * hue).float(), hue_turn)

    def of_images(self, images: slice) -> Jitters:
        """Return the jitters of a slice of the images."""
        return Jitters(*(values[images] for values in self))


def jitter(planes: Tensor, jitters: Jitters) -> Tensor:
    """Change brightness, contrast, saturation and hue in the order of each image, in place; return the planes."""
    bounds = torch.searchsorted(jitters.hue_turn, torch.arange(5)).tolist()
    image, mean, gray = (to_device(values, planes.device)[..., None, None] for values in jitters[:3])
    hue = to_device(jitters.hue, planes.device)[:, None, None]
    for turn in range(4):
        start, stop = bounds[turn], bounds[turn + 1]
        if stop > start:
            _shift_hue(planes[:, start:stop], hue[start:stop])
        for part in (slice(start), slice(stop, None)):
            if planes[0, part].numel():
                _blend(planes[:, part], image[part, turn], mean[part, turn], gray[part, turn])
    return planes


def _blend(planes: Tensor, image_share: Tensor, mean_share: Tensor, gray_share: Tensor) -> None:
    gray = _gray(planes)
    other = gray.mean((1, 2), keepdim=True).mul_(mean_share)
    planes.mul_(image_share).add_(gray.mul_(gray_share).add_(other)).clamp_(0, 1)


def _gray(planes: Tensor) -> Tensor:
    red, green, blue = planes
    return (red * _GRAY[0]).add_(green, alpha=_GRAY[1]).add_(blue, alpha=_GRAY[2])


def _shift_hue(planes: Tensor, hue: Tensor) -> None:
    """Shift the hue of each pixel in the HSV model, where h in [0, 6) counts sextants from red."""
    red, green, blue = planes
    largest, smallest = planes.amax(0), planes.amin(0)
    chroma = largest - smallest
    scale = 1 / chroma.clamp(min=1e-12)  # for a gray pixel all differences, and their products with this, are 0
    # Around red, h = (green − blue) / chroma; green and blue follow at 2 and 4. Factors of zero and one are several
    # times as fast as torch.where.
    is_red = torch.eq(red, largest, out=torch.empty_like(red))
    is_green = torch.eq(green, largest, out=torch.empty_like(red))
    sextant = (red - green).mul_(scale).add_(4)
    sextant.lerp_((blue - red).mul_(scale).add_(2), is_green)
    sextant.lerp_((green - blue).mul_(scale), is_red)
    sextant.add_(hue)
    sextant.sub_(sextant.div(6).floor_(), alpha=6)
    torch.addcmul(smallest, chroma, sextant.sub(3).abs_().sub_(1).clamp_(0, 1), out=red)
    torch.addcmul(smallest, chroma, sextant.sub(2).abs_().neg_().add_(2).clamp_(0, 1), out=green)
    torch.addcmul(smallest, chroma, sextant.sub(4).abs_().neg_().add_(2).clamp_(0, 1), out=blue)


def grayscale(planes: Tensor, chosen: Tensor) -> Tensor:
    """Replace the images with indices ``chosen`` (int64, on the CPU) by gray images in place; return the planes."""
    chosen = to_device(chosen, planes.device)
    gray = _gray(planes.index_select(1, chosen))
    return planes.index_copy_(1, chosen, gray.expand(3, *gray.shape))


def blur(planes: Tensor, sigma: Tensor) -> Tensor:
    """Return the images after Pillow's Gaussian blur of σ = ``sigma`` pixels (float64, (n,), 0 < σ ≤ 2).

    Pillow averages three times over a box of fractional width, with edge pixels repeated outside the image. It also
    rounds to whole levels after each pass, which this function does not.
    """
    assert (sigma <= _MAX_SIGMA).all()
    variance = sigma.square() / _NUM_BOXES
    whole = (((12 * variance + 1).sqrt() - 1) / 2).floor()
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1).square()))
    full = 1 / (2 * (whole + part) + 1)
    edge = (1 - (2 * whole + 1) * full) / 2
    near, far = torch.where(whole > 0, full, edge), torch.where(whole > 0, edge, 0.0)
    weights = to_device(torch.stack([far, near, full, near, far], -1).float(), planes.device).repeat(3, 1)[:, None]
    for _ in range(2):
        size, others = planes.shape[2:]
        lines = torch.arange(size, device=planes.device)[:, None] + torch.arange(-2, 3, device=planes.device)
        lines = lines.clamp(0, size - 1)
        taps = Taps(lines.expand(len(weights), -1, -1), weights.expand(-1, size, -1))
        table = taps.summed(planes.reshape(-1, others), _NUM_BOXES)
        planes = table.view(3, -1, size, others).transpose(2, 3)
    return planes


def solarize(planes: Tensor, chosen: Tensor) -> Tensor:
    """Invert values of at least 128/255 in the images ``chosen`` (int64, on the CPU) in place; return the planes."""
    chosen = to_device(chosen, planes.device)
    images = planes.index_select(1, chosen)
    return planes.index_copy_(1, chosen, torch.where(images < 128 / 255, images, 1 - images))
