"""Data that has nothing to learn in common: what must not give a staircase."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stepwise_lightning import TwoViewDataModule
from stepwise_lightning.data.image_sets import ImageSet
from stepwise_lightning.data.sampling import ResumableLoader
from stepwise_lightning.seeding import hashed_seed


class WrongPairs(TwoViewDataModule):
    """Second views of other images: those of the next image of the batch. What is measured are right pairs."""

    def train_dataloader(self) -> ResumableLoader:
        """Return batches (x1, x2, label) whose x2 do not belong to x1."""
        loader = super().train_dataloader()
        loader.collate_fn = _exchanged(loader.collate_fn)
        return loader


class _exchanged:
    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __call__(self, samples: Any) -> tuple[Tensor, Tensor, Tensor]:
        x1, x2, labels = self.collate(samples)
        return x1, x2.roll(1, 0), labels


class NoiseImages(TwoViewDataModule):
    """Images of independent, uniformly random pixels, as many and as large as those of the data set."""

    def images(self, split: str) -> ImageSet:
        """Return a split of noise; the labels stay."""
        if split not in self._sets:
            images = super().images(split)
            assert isinstance(images.images, Tensor)
            generator = torch.Generator().manual_seed(hashed_seed(self.hparams["seed"], "noise", split))
            noise = torch.randint(0, 256, images.images.shape, dtype=torch.uint8, generator=generator)
            self._sets[split] = ImageSet(noise, images.labels, images.class_names)
        return self._sets[split]
