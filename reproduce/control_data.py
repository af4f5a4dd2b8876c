"""Data modules for negative controls: wrong pairs, and images of noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stepwise_lightning import TwoViewDataModule
from stepwise_lightning.data.image_sets import ImageSet
from stepwise_lightning.data.sampling import ResumableLoader
from stepwise_lightning.seeding import hashed_seed


class WrongPairs(TwoViewDataModule):
    """Pair the first view of each image with the second view of another; the probe pairs stay correct."""

    def train_dataloader(self) -> ResumableLoader:
        """Return batches (x1, x2, label) with x2 rolled by one sample."""
        loader = super().train_dataloader()
        loader.finish = _RollSecondViews(loader.finish)
        return loader


class _RollSecondViews:
    def __init__(self, finish: Any) -> None:
        self.finish = finish

    def __call__(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        x1, x2, labels = self.finish(batch)
        return x1, x2.roll(1, 0), labels


class NoiseImages(TwoViewDataModule):
    """Replace the images by independent, uniformly random pixels of the same shape."""

    def images(self, split: str) -> ImageSet:
        """Return a split of noise with the original labels."""
        if split not in self._sets:
            images = super().images(split)
            assert isinstance(images.images, Tensor)
            generator = torch.Generator().manual_seed(hashed_seed(self.seed, "noise", split))
            noise = torch.randint(0, 256, images.images.shape, dtype=torch.uint8, generator=generator)
            self._sets[split] = ImageSet(noise, images.labels, images.class_names)
        return self._sets[split]
