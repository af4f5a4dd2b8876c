"""Two views of every image of a batch at once, for image sets held in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from stepwise_lightning.data import batch_operations as operations
from stepwise_lightning.data.augmentation import AugmentationParameters
from stepwise_lightning.data.counter_rng import uniforms
from stepwise_lightning.data.image_sets import ImageSet

__all__ = ["BatchTwoViews", "BatchViews", "drawn_crops"]

_TRIES = 10  # of torchvision's RandomResizedCrop, before it takes the largest crop in the middle
_MAX_FLOATS = 3 * 2**17  # worked on at once by a CPU: what its cache holds with a few copies


class BatchViews:
    """Two random views of each image of a batch, each a function of (seed, epoch, index, view) alone.

    The distributions are those of :func:`stepwise_lightning.data.views.random_view`, and so are the operations, on
    floats: Pillow rounds to whole levels after each and truncates in its colour jitter, so that its views are two
    of 255 levels darker in the mean (1.6 to 2.2 by channel, ``standard`` on the photographs). The draws are others
    than those of the per-sample path.

    An image's view is the same to the last bit whichever images are with it in a batch, however a batch is divided,
    and for every number of threads.

    Args:
        augmentation: ``standard`` or ``weak``.
        image_size: side of the views in pixels.
        mean: of the channels, in [0, 1].
        std: of the channels, in [0, 1].
        seed: of the draws.

    Raises:
        ValueError: another augmentation.

    """

    def __init__(
        self, augmentation: str, image_size: int, mean: Sequence[float], std: Sequence[float], seed: int
    ) -> None:
        self.strengths, self.image_size, self.seed = AugmentationParameters.of(augmentation), image_size, seed
        self.mean, self.std = (torch.tensor(values, dtype=torch.float32) for values in (mean, std))

    @torch.no_grad()
    def __call__(self, images: Tensor, epochs: Sequence[int], indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return two views of each image.

        Args:
            images: uint8, (n, 3, h, w), on the CPU or a CUDA device, where everything is then done.
            epochs: of each image, n numbers.
            indices: of each image in its data set, n numbers.

        Returns:
            x1, x2, float32, (n, 3, image_size, image_size) each, normalised, on the device of ``images``.

        """
        uniform = [uniforms(self.seed, epochs, indices, view, _Draws.COUNT) for view in (1, 2)]
        draws = _Draws(torch.cat(uniform), self.strengths)
        rows, columns = draws.taps(images.shape[2:], self.image_size)
        device, order = images.device, draws.order.to(images.device)
        mean, std = (values.to(device)[:, None, None, None] for values in (self.mean, self.std))
        views = torch.empty(len(order), 3, self.image_size, self.image_size, dtype=torch.float32, device=device)
        at_once = len(order) if images.is_cuda else max(1, _MAX_FLOATS // views[0].numel())
        for start in range(0, len(order), at_once):
            part = slice(start, start + at_once)
            planes = operations.resized_crops(
                images.index_select(0, order[part] % len(images)), rows.of_images(part), columns.of_images(part)
            )
            normalised = torch.empty_like(views[part])
            torch.sub(draws.apply(planes, start), mean, out=normalised.transpose(0, 1)).div_(std)
            views.index_copy_(0, order[part], normalised)
        return views[: len(images)], views[len(images) :]


class _Draws:
    """The parameters of a batch's views, sorted as the operations want them, on the CPU: a GPU is never waited for.

    Attributes:
        order: the numbers of the images in the order of the parameters.

    """

    COUNT = 2 * _TRIES + 15

    def __init__(self, uniform: Tensor, strengths: AugmentationParameters) -> None:
        self.strengths = strengths
        turns = uniform[:, 8:12].argsort(1)
        place_of_hue = (turns == operations.HUE).long().argmax(1)
        is_jittered = uniform[:, 3] < strengths.jitter_probability
        self.order = torch.where(is_jittered, place_of_hue, 4).argsort(stable=True)
        self._uniform, self._num_jittered = uniform[self.order], int(is_jittered.sum())
        if strengths.jitter:
            jittered = self.order[: self._num_jittered]
            change = (2 * uniform[jittered, 4:8] - 1) * torch.tensor(strengths.jitter, dtype=torch.float64)
            self._jitters = operations.Jitters.of(1 + change[:, :3], change[:, 3], turns[jittered])

    def taps(self, image_shape: Sequence[int], size: int) -> tuple[operations.Taps, operations.Taps]:
        """Return which rows and columns of images of 0 to 255 levels make those of the crops, values in [0, 1]."""
        top, left, height, width = drawn_crops(self._uniform[:, 15:], self._uniform[:, :2], self.strengths, image_shape)
        rows = operations.Taps.of_crops(top, height, image_shape[0], size, factor=1 / 255)
        return rows, operations.Taps.of_crops(left, width, image_shape[1], size, flip=self._uniform[:, 2] < 0.5)

    def apply(self, planes: Tensor, start: int) -> Tensor:
        """Apply what follows the crop to the images from number ``start`` of the order, in place; return the planes."""
        if not self.strengths.jitter:
            return planes
        part = slice(start, start + planes.shape[1])
        jittered = self._jitters.of_images(part)
        operations.jitter(planes[:, : len(jittered.place)], jittered)
        is_gray, is_blurred, strength = self._uniform[part, 12:15].unbind(1)
        operations.grayscale(planes, (is_gray < self.strengths.gray_probability).nonzero().flatten())
        blurred = (is_blurred < self.strengths.blur_probability).nonzero().flatten()
        if len(blurred):
            low, high = self.strengths.blur_sigma
            sigma = low + (high - low) * strength[blurred]
            blurred = blurred.to(planes.device)
            planes.index_copy_(1, blurred, operations.blur(planes.index_select(1, blurred), sigma))
        return planes


def drawn_crops(
    tries: Tensor, place: Tensor, strengths: AugmentationParameters, image_shape: Sequence[int]
) -> tuple[Tensor, ...]:
    """Return top, left, height and width, int64, (n,) each, of torchvision's RandomResizedCrop.

    The first of ten draws of area and log-ratio that fits the image counts.
    """
    image_height, image_width = image_shape
    low, high = strengths.crop_scale
    area = image_height * image_width * (low + (high - low) * tries[:, :_TRIES])
    log_ratio = torch.tensor(strengths.crop_ratio, dtype=torch.float64).log()
    ratio = torch.lerp(log_ratio[0], log_ratio[1], tries[:, _TRIES:]).exp()
    heights, widths = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    fits = (heights > 0) & (heights <= image_height) & (widths > 0) & (widths <= image_width)
    first = fits.long().argmax(1, keepdim=True)
    # Without a fit, the largest crop in the middle whose ratio is allowed.
    largest_height = min(image_height, round(image_width / strengths.crop_ratio[0]))
    largest_width = min(image_width, round(image_height * strengths.crop_ratio[1]))
    none = ~fits.any(1)
    height = heights.gather(1, first).flatten().masked_fill(none, largest_height)
    width = widths.gather(1, first).flatten().masked_fill(none, largest_width)
    top, left = (place[:, 0] * (image_height - height + 1)).floor(), (place[:, 1] * (image_width - width + 1)).floor()
    top = torch.where(none, (image_height - height).div(2, rounding_mode="floor"), top)
    left = torch.where(none, (image_width - width).div(2, rounding_mode="floor"), left)
    return top.long(), left.long(), height.long(), width.long()


class BatchTwoViews(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Two views of images held in memory, in whole batches, addressed by (epoch, index) as :class:`TwoViews`.

    A DataLoader asks for all addresses of a batch at once and must leave what it gets as it is
    (``collate_fn=BatchTwoViews.as_they_are``): x1, x2, float32, (n, 3, image_size, image_size), and labels, (n,), all
    on ``device``.

    Args:
        images: held in memory.
        views: what makes them.
        device: where; the uint8 images are sent there, batch by batch.

    """

    def __init__(self, images: ImageSet, views: BatchViews, device: torch.device | str = "cpu") -> None:
        assert isinstance(images.images, Tensor)
        self.images, self.views, self.device = images, views, torch.device(device)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, address: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return both views and the label of one image."""
        x1, x2, labels = self.__getitems__([address])
        return x1[0], x2[0], labels[0]

    def __getitems__(self, addresses: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Return both views and the labels of a batch."""
        assert isinstance(self.images.images, Tensor)
        epochs, indices = zip(*addresses, strict=True)
        chosen = torch.tensor(indices)
        images = self.images.images[chosen].to(self.device)
        x1, x2 = self.views(images, epochs, indices)
        return x1, x2, self.images.labels[chosen].to(self.device)

    @staticmethod
    def as_they_are(batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the batch: nothing is left to collate."""
        return batch
