"""Pairs of random crops, drawn once and used as one full batch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Any

from torch import Tensor

from stepwise_lightning.data.image_sets import load_images
from stepwise_lightning.data.seeded_datamodule import SeededDataModule
from stepwise_lightning.data.views import crop_pairs
from stepwise_lightning.errors import UserError
from stepwise_lightning.seeding import checked_seed


class FixedCropPairs(SeededDataModule):
    """Data of the linear experiment: pairs of random crops, drawn once and returned as one full batch at every step.

    Args:
        data: ``photos``, ``cifar10``, ``stl10``, or the path of a folder of images.
        num_pairs: number of pairs, at most the number of images.
        crop_size: side of the crops in pixels.
        seed: seed of the images and crop positions; None for the global seed (``seed_everything``).
        steps_per_epoch: number of times that the batch is repeated in one epoch.
        root: folder of ``cifar10`` and ``stl10``.
        download: download the data set if missing.

    Attributes:
        x1, x2: the views after ``setup``, float32, (num_pairs, 3, crop_size, crop_size).
        seed: the seed in use, see :class:`.SeededDataModule`.

    Raises:
        ValueError, FileNotFoundError: see ``load_images`` and ``crop_pairs``; raised in ``setup``, except for
            ``steps_per_epoch`` and ``seed``.

    """

    x1: Tensor
    x2: Tensor

    def __init__(
        self,
        data: str = "photos",
        num_pairs: int = 500,
        crop_size: int = 20,
        seed: int | None = None,
        steps_per_epoch: int = 1000,
        root: str = "data",
        download: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if steps_per_epoch < 1:
            raise UserError(f"steps_per_epoch must be at least 1, got {steps_per_epoch}")
        checked_seed(seed)
        self._set_seed(seed)

    def setup(self, stage: str | None = None) -> None:
        """Load the images and draw the pairs."""
        before = self.seed
        super().setup(stage)
        if not hasattr(self, "x1") or self.seed != before:
            self._draw()

    def _draw(self) -> None:
        h = self.hparams
        images = load_images(h["data"], h["root"], h["download"])
        self.x1, self.x2 = crop_pairs(images, h["num_pairs"], h["crop_size"], self.seed)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Use the seed of the checkpoint, unless the constructor got one."""
        before = self.seed
        super().load_state_dict(state)
        if self.seed != before:
            self._draw()

    def train_dataloader(self) -> _Repeated:
        """Return an iterable of the full batch (x1, x2), repeated ``steps_per_epoch`` times."""
        return _Repeated((self.x1, self.x2), self.hparams["steps_per_epoch"])

    def val_dataloader(self) -> _Repeated:
        """Return an iterable of the same batch, once: no images are held out."""
        return _Repeated((self.x1, self.x2), 1)


class _Repeated:
    """Iterable that repeats one batch without copying it, unlike a DataLoader.

    The position within an epoch is irrelevant, and the state is empty.
    """

    def __init__(self, batch: tuple[Tensor, Tensor], times: int) -> None:
        self.batch, self.times = batch, times

    def __len__(self) -> int:
        return self.times

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return repeat(self.batch, self.times)

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass
