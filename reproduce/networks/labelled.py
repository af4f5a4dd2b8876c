"""Labelled images for classifiers on representations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def labelled_images(dataset: Any, size: int) -> tuple[Tensor, Tensor]:
    """Return at most ``size`` evenly spaced images of a data set of (image, label), in a fixed random order.

    Folders are sorted by class: their first images contain few classes, and batch normalisation with the statistics of
    a batch of one class hides the class.

    Args:
        dataset: items are an image (3, h, w) and a label; images with a negative label are omitted.
        size: largest number of images, counted before the omission, ≥ 1.

    Returns:
        Images (n, 3, h, w) and labels (n,), int64.

    """
    chosen = torch.linspace(0, len(dataset) - 1, min(size, len(dataset))).long()
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))]
    images, labels = zip(*(dataset[index] for index in chosen.tolist()), strict=True)
    known = torch.tensor([int(label) for label in labels])
    return torch.stack(images)[known >= 0], known[known >= 0]
