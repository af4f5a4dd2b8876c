"""Memory-map STL-10: torchvision would load 2.9 GB into each process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class JoinedImages:
    """Several uint8 tensors of images, (n_i, 3, h, w) each, indexed as one without copying them."""

    def __init__(self, parts: list[Tensor]) -> None:
        self.parts = parts
        self.shape = torch.Size([sum(map(len, parts)), *parts[0].shape[1:]])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Return a copy of the images with these indices, int64, (n,), as (n, 3, h, w)."""
        images, start = torch.empty(len(indices), *self.shape[1:], dtype=torch.uint8), 0
        for part in self.parts:
            inside = (indices >= start) & (indices < start + len(part))
            images[inside] = part[indices[inside] - start]
            start += len(part)
        return images

    def split(self, size: int) -> Iterator[Tensor]:
        """Yield at most ``size`` images at a time."""
        for part in self.parts:
            yield from part.split(size)


def load_stl10(root: str, train: bool, download: bool, verify: bool = True) -> tuple[JoinedImages, Tensor, list[str]]:
    """Return images, labels and class names of ``train+unlabeled`` or of ``test``.

    The images, (N, 3, 96, 96), are memory-mapped; labels, int64, (N,), are −1 for unknown. Damaged files raise a
    RuntimeError; with ``verify``, they are compared with their checksums.
    """
    from torchvision.datasets import STL10
    from torchvision.datasets.utils import check_integrity

    folder, files = Path(root, STL10.base_folder), STL10.train_list if train else STL10.test_list
    if not all(check_integrity(folder / name, md5 if verify else None) for name, md5 in files):
        if not download:
            raise RuntimeError(f"{folder} is missing or damaged")
        STL10(root, "test", download=True)
    names = [name for name, _ in files]
    # Copy-on-write, because torch warns of read-only arrays. The files store columns first.
    mapped = [np.memmap(folder / name, np.uint8, "c") for name in names if name.endswith("_X.bin")]
    images = JoinedImages([torch.from_numpy(pixels).view(-1, 3, 96, 96).transpose(2, 3) for pixels in mapped])
    known = np.concatenate([np.fromfile(folder / name, np.uint8) for name in names if name.endswith("_y.bin")])
    labels = torch.full((len(images),), -1)
    labels[: len(known)] = torch.from_numpy(known).long() - 1
    return images, labels, (folder / STL10.class_names_file).read_text(encoding="utf-8").splitlines()
