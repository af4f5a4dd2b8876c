"""Batches of a stream of images."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from stepwise_lightning.data.batch_views import BatchViews, ReadBatch
from stepwise_lightning.data.image_files import rgb_image
from stepwise_lightning.data.own_images import ImageStream
from stepwise_lightning.errors import UserError
from stepwise_lightning.seeding import hashed_seed


class StreamTwoViews(Dataset[ReadBatch | None]):
    """Batches of a stream, indexed by (epoch, number of the batch); None after the last one.

    The stream is divided into global batches in its order; an incomplete last batch is dropped. Rank r of R reads the
    r-th of R equal slices of each. Every process, also of workers, passes over the other samples without decoding them.
    A batch is a function of (epoch, number) if the stream yields the same samples in the same order in every process
    and pass. Requests in ascending order read the stream once.
    """

    def __init__(
        self,
        images: ImageStream,
        views: BatchViews,
        device: torch.device | str,
        global_batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        self.images, self.views, self.device = images, views, torch.device(device)
        self.global_batch_size, self.local_batch_size = global_batch_size, global_batch_size // num_replicas
        self.rank = rank
        self._samples: Iterator[Any] = iter(())
        self._epoch, self._next = -1, 0  # the next batch that the iterator yields

    def __getitem__(self, key: tuple[int, int]) -> ReadBatch | None:
        """Read the samples of this rank in one global batch."""
        epoch, number = key
        if self._epoch != epoch or self._next > number:
            self._samples, self._epoch, self._next = self.images.one_pass(epoch), epoch, 0
        before = (number - self._next) * self.global_batch_size + self.rank * self.local_batch_size
        after = self.global_batch_size - (self.rank + 1) * self.local_batch_size
        count = _skip(self._samples, before)
        samples = list(islice(self._samples, self.local_batch_size))
        count += len(samples) + _skip(self._samples, after)
        if count < before + self.local_batch_size + after:
            if number == 0:
                raise UserError(
                    f"global_batch_size {self.global_batch_size} is larger than the stream of {count} training images"
                )
            return None
        self._next = number + 1
        images, names, labels = zip(*samples, strict=True)
        indices = [_index(name) for name in names]
        pictures = [rgb_image(image, self.views.min_side) for image in images]
        return ReadBatch.of(pictures, labels, [epoch] * len(indices), indices)

    def views_of(self, batch: ReadBatch | None) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return the views and labels of a batch, on ``device``."""
        return None if batch is None else self.views.of_batch(batch, self.device)


def _index(name: int | str) -> int:
    """Return an integer id of up to 64 bits unchanged, and 63 bits of the hash of another one."""
    name = int(name) if isinstance(name, Integral) else name
    return name if isinstance(name, int) and -(2**63) <= name < 2**63 else hashed_seed(name) >> 1


def _skip(samples: Iterator[Any], count: int) -> int:
    return sum(1 for _ in islice(samples, count))
