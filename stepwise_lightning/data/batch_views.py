"""Two augmented views of each image of a batch, computed at once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from stepwise_lightning.asynchronous import to_device
from stepwise_lightning.data import batch_operations as operations
from stepwise_lightning.data.augmentation import AugmentationParameters
from stepwise_lightning.data.image_sets import MAX_SIDE_IN_MEMORY, ImageSet
from stepwise_lightning.data.stl10 import JoinedImages
from stepwise_lightning.seeding import hashed_seed, uniform

if TYPE_CHECKING:  # importing this package needs only torch and lightning
    from PIL import Image

_TRIES = 10  # of torchvision's RandomResizedCrop, before it falls back to the largest central crop
_MAX_FLOATS = 3 * 2**17  # per chunk on a CPU: fits into its cache with a few copies
_MAX_FLOATS_ON_GPU = 2**26  # of regions padded to one size
PROBE_EPOCH = -1  # not a training epoch: probe pairs share no random numbers with training


class BatchViews:
    """Two random views of each image of a batch, each a function of (seed, epoch, index, view).

    Distributions equal torchvision's ``RandomResizedCrop``, ``RandomHorizontalFlip``, ``ColorJitter`` and
    ``RandomGrayscale``, and Pillow's Gaussian blur, on floats: Pillow rounds to whole levels after each operation and
    truncates in its colour jitter, which makes its views two of 255 levels darker on average (1.6 to 2.2 by channel,
    ``standard`` on the photographs).

    A view is bitwise independent of the other images in the batch and their sizes, of how a batch is divided, and of
    the number of threads.

    Attributes:
        min_side: shorter side in pixels at which no crop is smaller than a view. Files at least twice as large are
            reduced when they are decoded, except images small enough to be held in memory.

    """

    def __init__(
        self, augmentation: str, image_size: int, mean: Sequence[float], std: Sequence[float], seed: int
    ) -> None:
        self.parameters, self.image_size, self.seed = AugmentationParameters.of(augmentation), image_size, seed
        self.mean, self.std = (torch.tensor(values, dtype=torch.float32) for values in (mean, std))
        smallest = (self.parameters.crop_scale[0] * self.parameters.crop_ratio[0]) ** 0.5
        self.min_side = max(MAX_SIDE_IN_MEMORY + 1, ceil(image_size / smallest))

    @torch.no_grad()
    def __call__(
        self, images: Tensor | Sequence[Tensor], epochs: Sequence[int] | Tensor, indices: Sequence[int] | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return normalised views x1, x2, float32, (n, 3, image_size, image_size) each, on the device of ``images``.

        Images are uint8, (n, 3, h, w), or n images (3, h, w) of different sizes, on the CPU or a CUDA device.
        """
        numbers = [uniform(self.seed, epochs, indices, view, _Draws.COUNT) for view in (1, 2)]
        draws = _Draws(torch.cat(numbers), self.parameters)
        crops = _Crops(images, draws, self.image_size)
        device = images[0].device
        order = to_device(draws.order, device)
        mean, std = (to_device(values, device)[:, None, None, None] for values in (self.mean, self.std))
        views = torch.empty(len(order), 3, self.image_size, self.image_size, dtype=torch.float32, device=device)
        chunk = len(order) if device.type != "cpu" else max(1, _MAX_FLOATS // views[0].numel())
        for start in range(0, len(order), chunk):
            part = slice(start, start + chunk)
            planes = crops.planes(order, part)
            normalised = torch.empty_like(views[part])
            torch.sub(draws.apply(planes, start), mean, out=normalised.transpose(0, 1)).div_(std)
            views.index_copy_(0, order[part], normalised)
        return views[: len(images)], views[len(images) :]

    def of_batch(self, batch: ReadBatch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return the views and labels (x1, x2, labels) of a batch, computed on a device."""
        x1, x2 = self(batch.images(device), batch.epochs, batch.indices)
        return x1, x2, to_device(batch.labels, device)


class _Draws:
    """Random parameters of a batch's views, on the CPU, which avoids waiting for a GPU.

    Attributes:
        order: indices of the views in the order of the parameters: jittered views first, by the turn of their hue.

    """

    COUNT = 2 * _TRIES + 16

    def __init__(self, numbers: Tensor, parameters: AugmentationParameters) -> None:
        self.parameters = parameters
        turns = numbers[:, 8:12].argsort(1)
        turn_of_hue = (turns == operations.HUE).long().argmax(1)
        is_jittered = numbers[:, 3] < parameters.jitter_probability
        self.order = torch.where(is_jittered, turn_of_hue, 4).argsort(stable=True)
        self._numbers, self._view = numbers[self.order], self.order // (len(numbers) // 2)
        if parameters.jitter:
            jittered = self.order[: int(is_jittered.sum())]
            change = (2 * numbers[jittered, 4:8] - 1) * torch.tensor(parameters.jitter, dtype=torch.float64)
            self._jitters = operations.Jitters.of(1 + change[:, :3], change[:, 3], turns[jittered])

    def boxes(self, image_shapes: Tensor) -> tuple[Tensor, ...]:
        """Return the :func:`crop_boxes` and whether each crop is flipped, bool, (n,)."""
        boxes = crop_boxes(self._numbers[:, 15:-1], self._numbers[:, :2], self.parameters, image_shapes)
        return *boxes, self._numbers[:, 2] < 0.5

    def apply(self, planes: Tensor, start: int) -> Tensor:
        """Apply colour changes and blur in place to the planes of views ``order[start:]``; return the planes."""
        if not self.parameters.jitter:
            return planes
        part = slice(start, start + planes.shape[1])
        jittered = self._jitters.of_images(part)
        operations.jitter(planes[:, : len(jittered.hue_turn)], jittered)
        gray, blur, strength = self._numbers[part, 12:15].unbind(1)
        operations.grayscale(planes, (gray < self.parameters.gray_probability).nonzero().flatten())
        blur_probability, solarize_probability = (
            torch.tensor(values, dtype=torch.float64)[self._view[part]]
            for values in (self.parameters.blur_probability, self.parameters.solarize_probability)
        )
        blurred = (blur < blur_probability).nonzero().flatten()
        if len(blurred):
            low, high = self.parameters.blur_sigma
            sigma = low + (high - low) * strength[blurred]
            blurred = to_device(blurred, planes.device)
            planes.index_copy_(1, blurred, operations.blur(planes.index_select(1, blurred), sigma))
        solarized = (self._numbers[part, -1] < solarize_probability).nonzero().flatten()
        return operations.solarize(planes, solarized) if len(solarized) else planes


class _Crops:
    """Crops of the images for all views, in the order of the draws."""

    def __init__(self, images: Tensor | Sequence[Tensor], draws: _Draws, size: int) -> None:
        self._images = images
        if isinstance(images, Tensor):
            height: int | Tensor = images.shape[2]
            width: int | Tensor = images.shape[3]
            top, left, heights, widths, flip = draws.boxes(torch.tensor(images.shape[2:]))
        else:
            shapes = torch.tensor([image.shape[1:] for image in images])[draws.order % len(images)]
            height, width = shapes.double().unbind(1)
            top, left, heights, widths, flip = draws.boxes(shapes)
            numbers = torch.stack([draws.order % len(images), top, left, top + heights, left + widths], 1).tolist()
            self._regions = [images[k][:, i:m, j:n] for k, i, j, m, n in numbers]
            top = left = torch.zeros_like(top)
        self._rows = operations.Taps.of_crops(top, heights, height, size, factor=1 / 255)
        self._columns = operations.Taps.of_crops(left, widths, width, size, flip=flip)

    def planes(self, order: Tensor, part: slice) -> Tensor:
        """Return the crops ``order[part]``, resized and scaled to [0, 1], as planes."""
        rows, columns = self._rows.of_images(part), self._columns.of_images(part)
        if isinstance(self._images, Tensor):
            images = self._images.index_select(0, order[part] % len(self._images))
            return operations.resized_crops(images, rows, columns)
        max_floats = _MAX_FLOATS if order.device.type == "cpu" else _MAX_FLOATS_ON_GPU
        return operations.resized_regions(self._regions[part], rows, columns, max_floats)


def crop_boxes(
    tries: Tensor, place: Tensor, parameters: AugmentationParameters, image_shapes: Sequence[int] | Tensor
) -> tuple[Tensor, ...]:
    """Return top, left, height and width of the crops of torchvision's RandomResizedCrop, int64, (n,) each.

    The first of ten random pairs of area and log-ratio that fits the image is used. ``tries`` has ten uniform numbers
    for the area, then ten for the ratio, (n, 20), ``place`` two for its vertical and horizontal position, (n, 2).
    ``image_shapes`` are height and width of all images, (2,), or of each image, (n, 2).
    """
    shapes = torch.as_tensor(image_shapes, dtype=torch.float64)
    image_height, image_width = shapes[..., 0], shapes[..., 1]
    low, high = parameters.crop_scale
    area = shapes.prod(-1, keepdim=True) * (low + (high - low) * tries[:, :_TRIES])
    log_ratio = torch.tensor(parameters.crop_ratio, dtype=torch.float64).log()
    ratio = torch.lerp(log_ratio[0], log_ratio[1], tries[:, _TRIES:]).exp()
    heights, widths = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    fits = (heights > 0) & (heights <= shapes[..., :1]) & (widths > 0) & (widths <= shapes[..., 1:])
    first = fits.long().argmax(1, keepdim=True)
    # If none fits: the largest central crop with an allowed ratio.
    largest_height = image_height.minimum((image_width / parameters.crop_ratio[0]).round())
    largest_width = image_width.minimum((image_height * parameters.crop_ratio[1]).round())
    none = ~fits.any(1)
    height = torch.where(none, largest_height, heights.gather(1, first).flatten())
    width = torch.where(none, largest_width, widths.gather(1, first).flatten())
    top, left = (place[:, 0] * (image_height - height + 1)).floor(), (place[:, 1] * (image_width - width + 1)).floor()
    top = torch.where(none, (image_height - height).div(2, rounding_mode="floor"), top)
    left = torch.where(none, (image_width - width).div(2, rounding_mode="floor"), left)
    return top.long(), left.long(), height.long(), width.long()


class ReadBatch(NamedTuple):
    """Images of a batch as they are read, before augmentation."""

    pixels: Tensor  #: uint8, (n, 3, h, w); or (bytes,), the images one after the other, each (h, 3, w)
    shapes: Tensor  #: height and width of each image, int64, (n, 2), if ``pixels`` has one dimension
    epochs: Tensor  #: int64, (n,)
    indices: Tensor  #: of the images in their data set, int64, (n,)
    labels: Tensor  #: int64, (n,), −1 for unknown

    @classmethod
    def of(
        cls, pictures: Sequence[Image.Image], labels: Sequence[int], epochs: Sequence[int], indices: Sequence[int]
    ) -> ReadBatch:
        """Return a batch of images of any sizes."""
        pixels = bytearray().join(picture.tobytes("raw", "RGB;L") for picture in pictures)
        shapes = torch.tensor([(picture.height, picture.width) for picture in pictures])
        numbers = (torch.tensor(values) for values in (epochs, indices, labels))
        return cls(torch.frombuffer(pixels, dtype=torch.uint8), shapes, *numbers)

    def images(self, device: torch.device) -> Tensor | list[Tensor]:
        """Return uint8 images on a device, (n, 3, h, w), or (3, h, w) each."""
        pixels = to_device(self.pixels, device)
        if pixels.ndim > 1:
            return pixels
        parts = pixels.split((3 * self.shapes.prod(1)).tolist())
        shapes = self.shapes.tolist()
        return [part.view(h, 3, w).transpose(0, 1) for part, (h, w) in zip(parts, shapes, strict=True)]


class BatchTwoViews(Dataset[Any]):
    """Images of a set read per batch, indexed by (epoch, index), and their views.

    ``views_of(dataset.__getitems__(keys))`` is a batch (x1, x2, labels), computed on ``device``, to which the uint8
    images are copied batch by batch. Data workers read images; they also compute the views if it is the CPU.
    """

    def __init__(self, images: ImageSet, views: BatchViews, device: torch.device | str = "cpu") -> None:
        self.images, self.views, self.device = images, views, torch.device(device)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return both views and the label of one image."""
        x1, x2, labels = self.views_of(self.__getitems__([key]))
        return x1[0], x2[0], labels[0]

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> ReadBatch:
        """Read the images of a batch."""
        epochs, indices = zip(*keys, strict=True)
        if isinstance(self.images.images, Tensor | JoinedImages):
            chosen = torch.tensor(indices)
            known = self.images.labels[chosen]
            return ReadBatch(self.images.images[chosen], torch.empty(0), torch.tensor(epochs), chosen, known)
        seeds = [hashed_seed(self.views.seed, *key) for key in keys]
        pictures, labels = zip(*map(self.images.sample, indices, seeds, repeat(self.views.min_side)), strict=True)
        return ReadBatch.of(pictures, labels, epochs, indices)

    def views_of(self, batch: ReadBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the views and labels of a batch, on ``device``."""
        return self.views.of_batch(batch, self.device)
