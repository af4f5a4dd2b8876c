"""Data modules and learning rates of controls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor

from stepwise_lightning import TwoViewDataModule
from stepwise_lightning.data.image_sets import ImageSet
from stepwise_lightning.data.sampling import ResumableLoader
from stepwise_lightning.forecasts.simulate import forecast, unseen_batches
from stepwise_lightning.seeding import hashed_seed


class _ChangedPairs(TwoViewDataModule):
    """Change the second views of training batches; the probe pairs stay correct."""

    @staticmethod
    def second_views(x1: Tensor, x2: Tensor) -> Tensor:
        """Return the second views to train on."""
        raise NotImplementedError

    def train_dataloader(self) -> ResumableLoader:
        """Return batches (x1, x2, label) with changed second views."""
        loader = super().train_dataloader()
        loader.finish = _ChangeSecondViews(loader.finish, self.second_views)
        return loader


class _ChangeSecondViews:
    def __init__(self, finish: Any, second_views: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.finish, self.second_views = finish, second_views

    def __call__(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        x1, x2, labels = self.finish(batch)
        return x1, self.second_views(x1, x2), labels


class WrongPairs(_ChangedPairs):
    """Pair the first view of each image with the second view of another."""

    @staticmethod
    def second_views(x1: Tensor, x2: Tensor) -> Tensor:
        """Return the second views of the preceding samples of the batch."""
        return x2.roll(1, 0)


class IdenticalViews(_ChangedPairs):
    """Pair the first view of each image with itself."""

    @staticmethod
    def second_views(x1: Tensor, x2: Tensor) -> Tensor:
        """Return the first views."""
        return x1


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


class SafeRate(L.Callback):
    """Set the learning rate to ``share`` times the safe rate of the forecast from the untrained network."""

    def __init__(self, share: float = 1.0) -> None:
        self.share = share

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Compute the rate, before the weights of a checkpoint are loaded."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.rate = self.share * forecast(pl_module, unseen_batches(data), max_steps=2).rates.safe

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Set the rate of the optimiser; the setting of the module remains, because resuming compares it."""
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = self.rate
