"""Load image sets: their splits, labels and channel statistics.

``photos`` is bundled, ``cifar10`` and ``stl10`` come through torchvision and are downloaded only on request, and any
other name is the path of a folder. Small images of one size are held in memory as one uint8 tensor, STL-10 is
memory-mapped, and other images are read when needed.
"""

from __future__ import annotations

import os
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from stepwise_lightning.data.folders import format_counts, list_images, split_folder
from stepwise_lightning.data.image_files import (
    NUM_FOR_STATISTICS,
    channel_statistics,
    level_statistics,
    picture_levels,
    pixels,
    read_image,
    read_images,
    rgb_image,
    warn_of_unused_bits,
)
from stepwise_lightning.data.photographs import HELD_OUT, PHOTOGRAPHS, TRAIN, cut_photos
from stepwise_lightning.data.stl10 import JoinedImages, load_stl10
from stepwise_lightning.errors import NotFoundError, UserError

if TYPE_CHECKING:  # importing this package needs only torch and lightning
    from PIL import Image

DATA_SETS = ("photos", "cifar10", "stl10")
SPLITS = ("train", "val", "test")
MAX_SIDE_IN_MEMORY = 128
_MAX_BYTES_IN_MEMORY = 4 * 2**30


@dataclass(frozen=True)
class ImageSet:
    """One split of a data set."""

    images: Tensor | JoinedImages | list[str]  #: uint8, (N, 3, h, w); or N paths if images are large or differ in size
    labels: Tensor  #: int64, (N,); −1 for unknown
    class_names: list[str]  #: names of the labels 0, 1, …

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def in_memory(self) -> bool:
        """Whether ``images`` is indexed as a tensor."""
        return isinstance(self.images, Tensor | JoinedImages)

    def picture(self, index: int) -> Image.Image:
        """Return one image as RGB; ValueError with the file's name if it cannot be read."""
        return self.sample(index)[0]

    def sample(self, index: int, seed: int = 0, min_side: int = 0) -> tuple[Image.Image, int]:
        """Return one image as RGB, and its label; ``seed`` is of random transforms of a data set.

        Files are reduced to ``min_side``, see :func:`stepwise_lightning.data.image_files.read_image`.
        """
        image = self.images[index] if isinstance(self.images, list) else self.images[torch.tensor([index])][0]
        return rgb_image(image, min_side), int(self.labels[index])

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Return :func:`channel_statistics`, of 1000 evenly spaced images unless they are held in memory."""
        if not isinstance(self.images, list):
            return channel_statistics(self.images)
        paths, maxima = self.images[:: -(-len(self.images) // NUM_FOR_STATISTICS)], list[int]()
        counts = picture_levels(read_image(path, maxima) for path in paths)
        warn_of_unused_bits(maxima, os.path.commonpath([os.path.dirname(path) for path in paths]))
        return level_statistics(counts)


def load_images(data: str, root: str = "data", download: bool = False, image_size: int = 32) -> Tensor:
    """Return all images of a data set, or its training images, as uint8, (N, 3, h, w).

    Args:
        data: ``photos`` (all tiles of :func:`stepwise_lightning.data.photographs.cut_photos`), ``cifar10`` (training
            images), ``stl10`` (training and unlabelled images), or the path of a folder, searched at any depth.
        root: folder of ``cifar10`` and ``stl10``.
        download: download ``cifar10`` or ``stl10`` if missing.
        image_size: images of another size in a folder are resized (shorter side) and cropped at the centre.

    Raises:
        ValueError: unknown data set, or a folder without readable images.
        FileNotFoundError: the data set is missing and ``download`` is False.

    """
    if data == "photos":
        _warn_of_same_name(data)
        return cut_photos()[0]
    if data in DATA_SETS:
        images = load_image_set(data, "train", root, download).images
        assert not isinstance(images, list)
        return torch.cat(images.parts) if isinstance(images, JoinedImages) else images
    return _folder_images(existing_folder(data), image_size)


def load_image_set(
    data: str, split: str = "train", root: str = "data", download: bool = False, verify: bool = True
) -> ImageSet:
    """Return one split of a data set with its labels.

    ==========  ===================================  ==========================  ======================
    data        train                                val and test                labels
    ==========  ===================================  ==========================  ======================
    photos      tiles left of a cut                  tiles right of the cut      photograph
    cifar10     50 000 training images               10 000 test images          10 classes
    stl10       ``train+unlabeled``, 105 000 images  8000 test images            10 classes, −1 unknown
    a folder    ``train/``                           ``val/``, ``test/``         first-level subfolders
    a folder    without those: nine tenths           every tenth file, sorted    first-level subfolders
    ==========  ===================================  ==========================  ======================

    No pixel of ``photos`` is in two splits, but both show the same eight scenes. Every tenth file is a fair held-out
    set only if the files are independent: split near-duplicates, such as frames of a video, into folders yourself.
    Names of folders and files that cannot be read: ``docs/inputs.md``.

    Args:
        data: see the table.
        split: ``train``, ``val`` or ``test``.
        root: folder of ``cifar10`` and ``stl10``.
        download: download ``cifar10`` or ``stl10`` if missing.
        verify: compare the 3 GB of ``stl10`` with their checksums.

    Raises:
        ValueError: unknown data set or split, or a folder without readable images.
        FileNotFoundError: the data set is missing and ``download`` is False.

    """
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    train = split == "train"
    if train:  # once per run, because every run loads its training images
        _warn_of_same_name(data)
    if data == "photos":
        tiles, photograph, place = cut_photos()
        chosen = place == (TRAIN if train else HELD_OUT)
        return ImageSet(tiles[chosen], photograph[chosen], list(PHOTOGRAPHS))
    if data == "cifar10":
        cifar = _torchvision_set("cifar10", root, download, train=train)
        images = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()
        return ImageSet(images, torch.tensor(cifar.targets), list(cifar.classes))
    if data == "stl10":
        return ImageSet(*_torchvision_set("stl10", root, download, train=train, verify=verify))
    return _folder_set(existing_folder(data), split)


def download_images(data: str, root: str = "data") -> None:
    """Download ``cifar10`` or ``stl10`` into ``root`` if missing; do nothing for other data sets."""
    if data in ("cifar10", "stl10"):
        # The test split, because torchvision also loads the split, and this is the smaller one.
        load_image_set(data, "test", root, download=True)


def _torchvision_set(data: str, root: str, download: bool, **options: bool) -> Any:
    from torchvision.datasets import CIFAR10

    name, size, load = {"cifar10": ("CIFAR-10", "170 MB", CIFAR10), "stl10": ("STL-10", "2.6 GB", load_stl10)}[data]
    where = f"under {str(Path(root).resolve())!r}"
    try:
        return load(root, download=download, **options)
    except (RuntimeError, OSError) as error:
        if download:
            raise NotFoundError(f"{name} could not be downloaded and unpacked {where}: {error}") from error
        raise NotFoundError(
            f"no intact {name} {where}; get it ({size}) by allowing the download, or with: "
            f"stepwise download {data} --root {shlex.quote(root)}"
        ) from error


def _warn_of_same_name(data: str) -> None:
    if data in DATA_SETS and Path(data).is_dir():
        rank_zero_warn(
            f"data {data!r} is the built-in data set, not the folder {data!r}: for the folder, write './{data}'"
        )


def existing_folder(data: str) -> Path:
    """Return the path of a folder; UserError if it does not exist."""
    if not data or not Path(data).is_dir():
        raise UserError(
            f"data set {data!r} is neither one of {', '.join(DATA_SETS)} nor the path of an existing folder"
        )
    return Path(data)


def _folder_set(folder: Path, split: str) -> ImageSet:
    splits, left_out = split_folder(folder)
    if split == "train":  # once per run
        _log_left_out(folder, left_out)
    names = sorted({name for part in splits.values() for name in part.class_names} - {""})
    number_of = {name: number for number, name in enumerate(names)} | {"": -1}
    labels = torch.tensor([number_of[name] for name in splits[split].class_names])
    maxima: list[int] = []
    images = _in_memory(splits[split].paths, maxima)
    if split == "train" and not isinstance(images, list):
        warn_of_unused_bits(maxima, str(folder))
    return ImageSet(images, labels, names)


def _log_left_out(folder: Path, left_out: Counter[str]) -> None:
    if left_out:
        rank_zero_info(f"left out of {str(folder)!r}: {format_counts(left_out)}")


def _in_memory(paths: list[str], maxima: list[int]) -> Tensor | list[str]:
    """Return the images as uint8 (N, 3, h, w) if they are small and of one size, otherwise their paths."""
    shape = pixels(read_image(paths[0])).shape
    if max(shape) > MAX_SIDE_IN_MEMORY or len(paths) * shape.numel() > _MAX_BYTES_IN_MEMORY:
        return paths
    images = torch.empty(len(paths), *shape, dtype=torch.uint8)
    for index, image in enumerate(read_images(paths, maxima)):
        if image.shape != shape:
            return paths
        images[index] = image
    return images


def _folder_images(folder: Path, image_size: int) -> Tensor:
    from torchvision.transforms import v2

    listing, maxima = list_images(folder), list[int]()
    _log_left_out(folder, listing.left_out)
    fit = v2.Compose([v2.Resize(image_size, antialias=True), v2.CenterCrop(image_size)])
    images = torch.empty(len(listing.paths), 3, image_size, image_size, dtype=torch.uint8)
    for index, image in enumerate(read_images(listing.paths, maxima)):
        images[index] = image if image.shape[1:] == images.shape[2:] else fit(image)
    warn_of_unused_bits(maxima, str(folder))
    return images
