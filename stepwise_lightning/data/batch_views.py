"""Two augmented views of each image of a batch, computed at once for images held in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from stepwise_lightning.asynchronous import to_device
from stepwise_lightning.data import batch_operations as operations
from stepwise_lightning.data.augmentation import AugmentationParameters
from stepwise_lightning.data.counter_rng import uniform
from stepwise_lightning.data.image_sets import ImageSet

__all__ = ["BatchTwoViews", "BatchViews", "crop_boxes"]

_TRIES = 10  # of torchvision's RandomResizedCrop, before it falls back to the largest central crop
_MAX_FLOATS = 3 * 2**17  # per chunk on a CPU: fits into its cache with a few copies


class BatchViews:
    """Two random views of each image of a batch, each a function of (seed, epoch, index, view).

    Distributions and operations equal :func:`stepwise_lightning.data.views.random_views`, but on floats: Pillow rounds
    to whole levels after each operation and truncates in its colour jitter, which makes its views two of 255 levels
    darker on average (1.6 to 2.2 by channel, ``standard`` on the photographs). The random numbers differ from
    ``random_views``.

    A view is bitwise independent of the other images in the batch, of how a batch is divided, and of the number of
    threads.

    Args:
        augmentation: name of :class:`.AugmentationParameters`.
        image_size: side of the views in pixels.
        mean: channel means in [0, 1].
        std: channel standard deviations in [0, 1].
        seed: seed of the views.

    Raises:
        ValueError: unknown augmentation.

    """

    def __init__(
        self, augmentation: str, image_size: int, mean: Sequence[float], std: Sequence[float], seed: int
    ) -> None:
        self.parameters, self.image_size, self.seed = AugmentationParameters.of(augmentation), image_size, seed
        self.mean, self.std = (torch.tensor(values, dtype=torch.float32) for values in (mean, std))

    @torch.no_grad()
    def __call__(self, images: Tensor, epochs: Sequence[int], indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return two views of each image.

        Args:
            images: uint8, (n, 3, h, w), on the CPU or a CUDA device, which computes the views.
            epochs: epoch of each image.
            indices: index of each image in its data set.

        Returns:
            Normalised views x1, x2, float32, (n, 3, image_size, image_size) each, on the device of ``images``.

        """
        numbers = [uniform(self.seed, epochs, indices, view, _Draws.COUNT) for view in (1, 2)]
        draws = _Draws(torch.cat(numbers), self.parameters)
        rows, columns = draws.taps(images.shape[2:], self.image_size)
        device, order = images.device, to_device(draws.order, images.device)
        mean, std = (to_device(values, device)[:, None, None, None] for values in (self.mean, self.std))
        views = torch.empty(len(order), 3, self.image_size, self.image_size, dtype=torch.float32, device=device)
        chunk = len(order) if images.is_cuda else max(1, _MAX_FLOATS // views[0].numel())
        for start in range(0, len(order), chunk):
            part = slice(start, start + chunk)
            planes = operations.resized_crops(
                images.index_select(0, order[part] % len(images)), rows.of_images(part), columns.of_images(part)
            )
            normalised = torch.empty_like(views[part])
            torch.sub(draws.apply(planes, start), mean, out=normalised.transpose(0, 1)).div_(std)
            views.index_copy_(0, order[part], normalised)
        return views[: len(images)], views[len(images) :]


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

    def taps(self, image_shape: Sequence[int], size: int) -> tuple[operations.Taps, operations.Taps]:
        """Return the taps of the rows and columns of the crops, which also scale 0 to 255 to [0, 1]."""
        top, left, height, width = crop_boxes(
            self._numbers[:, 15:-1], self._numbers[:, :2], self.parameters, image_shape
        )
        rows = operations.Taps.of_crops(top, height, image_shape[0], size, factor=1 / 255)
        return rows, operations.Taps.of_crops(left, width, image_shape[1], size, flip=self._numbers[:, 2] < 0.5)

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


def crop_boxes(
    tries: Tensor, place: Tensor, parameters: AugmentationParameters, image_shape: Sequence[int]
) -> tuple[Tensor, ...]:
    """Return top, left, height and width of the crops of torchvision's RandomResizedCrop, int64, (n,) each.

    The first of ten random pairs of area and log-ratio that fits the image is used.

    Args:
        tries: ten uniform numbers for the area, then ten for the ratio, (n, 20).
        place: uniform numbers for the vertical and horizontal position, (n, 2).
        parameters: of the augmentation.
        image_shape: height and width of the images.

    """
    image_height, image_width = image_shape
    low, high = parameters.crop_scale
    area = image_height * image_width * (low + (high - low) * tries[:, :_TRIES])
    log_ratio = torch.tensor(parameters.crop_ratio, dtype=torch.float64).log()
    ratio = torch.lerp(log_ratio[0], log_ratio[1], tries[:, _TRIES:]).exp()
    heights, widths = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    fits = (heights > 0) & (heights <= image_height) & (widths > 0) & (widths <= image_width)
    first = fits.long().argmax(1, keepdim=True)
    # If none fits: the largest central crop with an allowed ratio.
    largest_height = min(image_height, round(image_width / parameters.crop_ratio[0]))
    largest_width = min(image_width, round(image_height * parameters.crop_ratio[1]))
    none = ~fits.any(1)
    height = heights.gather(1, first).flatten().masked_fill(none, largest_height)
    width = widths.gather(1, first).flatten().masked_fill(none, largest_width)
    top, left = (place[:, 0] * (image_height - height + 1)).floor(), (place[:, 1] * (image_width - width + 1)).floor()
    top = torch.where(none, (image_height - height).div(2, rounding_mode="floor"), top)
    left = torch.where(none, (image_width - width).div(2, rounding_mode="floor"), left)
    return top.long(), left.long(), height.long(), width.long()


class BatchTwoViews(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Two views of images held in memory, computed per batch and indexed by (epoch, index) as :class:`TwoViews`.

    A DataLoader must use ``collate_fn=BatchTwoViews.keep``, because its batches are complete: x1, x2, float32,
    (n, 3, image_size, image_size), and labels, (n,), all on ``device``.

    Args:
        images: set held in memory.
        views: generator of the views.
        device: device of the batches; the uint8 images are copied to it batch by batch.

    """

    def __init__(self, images: ImageSet, views: BatchViews, device: torch.device | str = "cpu") -> None:
        assert not isinstance(images.images, list)
        self.images, self.views, self.device = images, views, torch.device(device)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return both views and the label of one image."""
        x1, x2, labels = self.__getitems__([key])
        return x1[0], x2[0], labels[0]

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Return both views and the labels of a batch."""
        assert not isinstance(self.images.images, list)
        epochs, indices = zip(*keys, strict=True)
        chosen = torch.tensor(indices)
        images = to_device(self.images.images[chosen], self.device)
        x1, x2 = self.views(images, epochs, indices)
        return x1, x2, to_device(self.images.labels[chosen], self.device)

    @staticmethod
    def keep(batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the batch unchanged."""
        return batch
