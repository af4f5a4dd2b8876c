"""STL-10, checked and downloaded by torchvision, but mapped into memory: torchvision would load 2.9 GB."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stepwise_lightning.data.mapped_files import mapped_bytes

__all__ = ["stl10"]


def stl10(root: str, train: bool, download: bool) -> tuple[Tensor, Tensor, list[str]]:
    """Return images, labels and the names of the classes of ``train+unlabeled`` or of ``test``.

    Args:
        root: where the folder ``stl10_binary`` lies, or is put.
        train: which.
        download: fetch them unless they are there and intact.

    Returns:
        images, uint8, (N, 3, 96, 96), not contiguous: the files have columns first. Labels, int64, (N,), from 0; −1
        where unknown. Names.

    Raises:
        RuntimeError: they are not there, or not intact.
        OSError: they cannot be read, or downloaded.

    """
    from torchvision.datasets import STL10
    from torchvision.datasets.utils import check_integrity

    folder, files = Path(root, STL10.base_folder), STL10.train_list if train else STL10.test_list
    if not all(check_integrity(folder / name, md5) for name, md5 in files):
        if not download:
            raise RuntimeError(f"{folder} is not there, or not intact")
        STL10(root, "test", download=True)
    names = [name for name, _ in files]
    pixels = mapped_bytes([folder / name for name in names if name.endswith("_X.bin")])
    images = torch.from_numpy(pixels).view(-1, 3, 96, 96).transpose(2, 3)
    labels = torch.full((len(images),), -1)
    known = np.concatenate([np.fromfile(folder / name, np.uint8) for name in names if name.endswith("_y.bin")])
    labels[: len(known)] = torch.from_numpy(known).long() - 1
    return images, labels, (folder / STL10.class_names_file).read_text(encoding="utf-8").splitlines()
