"""Image sets: where images come from, how they are split, their labels and their channel statistics.

``photos`` (bundled, needs no network), ``cifar10`` and ``stl10`` (through torchvision, downloaded only when asked), or
the path of a folder. Small images of one size are one uint8 tensor in memory, that of STL-10 a part of memory that the
processes of a machine share; others are read when they are needed.
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

from stepwise_lightning.data.bit_depth import Depths
from stepwise_lightning.data.image_files import in_words, list_images, pixels, read_all, read_image
from stepwise_lightning.data.photographs import HELD_OUT, PHOTOGRAPHS, TRAIN, cut_photos
from stepwise_lightning.data.splits import split_folder
from stepwise_lightning.data.stl10 import stl10
from stepwise_lightning.errors import NotFoundError, UserError

if TYPE_CHECKING:  # importing this package needs only torch and lightning
    from PIL import Image

DATA_SETS = ("photos", "cifar10", "stl10")
SPLITS = ("train", "val", "test")
_MAX_SIDE_IN_MEMORY = 128
_MAX_BYTES_IN_MEMORY = 4 * 2**30


@dataclass(frozen=True)
class ImageSet:
    """One split of a data set.

    Attributes:
        images: uint8, (N, 3, h, w); or N paths, where the images are large or differ in size.
        labels: int64, (N,); −1 where unknown.
        class_names: what the labels 0, 1, … stand for.

    """

    images: Tensor | list[str]
    labels: Tensor
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def picture(self, index: int) -> Image.Image:
        """Return one image as RGB; ValueError naming the file if it cannot be read."""
        if isinstance(self.images, Tensor):
            from PIL import Image

            return Image.fromarray(self.images[index].permute(1, 2, 0).contiguous().numpy())
        return read_image(self.images[index])

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Return :func:`channel_statistics`; of 1000 evenly spaced images where they are not held in memory."""
        if isinstance(self.images, Tensor):
            return channel_statistics(self.images)
        spaced, depths = self.images[:: -(-len(self.images) // 1000)], Depths()
        pictures = (pixels(read_image(path, depths)) for path in spaced)
        counts = sum((_histogram(picture[None]) for picture in pictures), torch.zeros(3, 256))
        depths.warn(os.path.commonpath([os.path.dirname(path) for path in spaced]))
        return _statistics(counts)


def load_images(data: str, root: str = "data", download: bool = False, image_size: int = 32) -> Tensor:
    """Return all images of a data set, or its training images, as uint8, (N, 3, h, w).

    Args:
        data: ``photos`` (all tiles of :func:`stepwise_lightning.data.photographs.cut_photos`), ``cifar10`` (training
            images), ``stl10`` (training and unlabelled images), or the path of a folder that is searched for image
            files at any depth.
        root: where ``cifar10`` and ``stl10`` are looked for, and put.
        download: fetch ``cifar10`` or ``stl10`` if it is not there.
        image_size: images in a folder that differ are resized (shorter side) and cropped at the centre.

    Raises:
        ValueError: unknown data set, or a folder without readable images.
        FileNotFoundError: the data set is not there and was not asked to be downloaded.

    """
    if data == "photos":
        _warn_of_a_folder(data)
        return cut_photos()[0]
    if data in DATA_SETS:
        images = load_image_set(data, "train", root, download).images
        assert isinstance(images, Tensor)
        return images
    return _folder_images(_existing_folder(data), image_size)


def load_image_set(data: str, split: str = "train", root: str = "data", download: bool = False) -> ImageSet:
    """Return one split of a data set with its labels.

    ==========  ===================================  ==========================  ======================
    data        train                                val and test                labels
    ==========  ===================================  ==========================  ======================
    photos      tiles left of a cut                  tiles right of the cut      which photograph
    cifar10     50 000 training images               10 000 test images          10 classes
    stl10       ``train+unlabeled``, 105 000 images  8000 test images            10 classes, −1 unknown
    a folder    ``train/``                           ``val/``, ``test/``         first-level subfolders
    a folder    without those: nine tenths           every tenth file, sorted    first-level subfolders
    ==========  ===================================  ==========================  ======================

    No pixel of ``photos`` is in two splits, but all show the same eight scenes. A folder counts as split when it has
    ``train/`` and at least one of ``val/`` and ``test/``, or folders of other usual names
    (:mod:`stepwise_lightning.data.splits`); one serves for both. Every tenth file is held out fairly only
    if the files are different: split near-duplicates, such as frames of a video, into folders yourself. Subfolders
    without images are no classes. The first three names mean the data sets even where folders are called so; write
    ``./photos`` for the folder. :mod:`stepwise_lightning.data.image_files` says which files are found and how they
    are read; one that cannot be is refused, here if the images are small, otherwise when its turn comes.

    Args:
        data: see the table.
        split: ``train``, ``val`` or ``test``.
        root: where ``cifar10`` and ``stl10`` are looked for, and put.
        download: fetch ``cifar10`` or ``stl10`` if it is not there.

    Raises:
        ValueError: unknown data set or split, or a folder without readable images.
        FileNotFoundError: the data set is not there and was not asked to be downloaded.

    """
    if split not in SPLITS:
        raise UserError(f"split {split!r} is none of {', '.join(SPLITS)}")
    train = split == "train"
    if train:  # once for a run, which always has training images
        _warn_of_a_folder(data)
    if data == "photos":
        tiles, photograph, place = cut_photos()
        chosen = place == (TRAIN if train else HELD_OUT)
        return ImageSet(tiles[chosen], photograph[chosen], list(PHOTOGRAPHS))
    if data == "cifar10":
        cifar = _torchvision_set("cifar10", root, download, train=train)
        images = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()
        return ImageSet(images, torch.tensor(cifar.targets), list(cifar.classes))
    if data == "stl10":
        return ImageSet(*_torchvision_set("stl10", root, download, train=train))
    return _folder_set(_existing_folder(data), split)


def download_images(data: str, root: str = "data") -> None:
    """Fetch ``cifar10`` or ``stl10`` into ``root`` unless it is there; other data sets need no download."""
    if data in ("cifar10", "stl10"):
        # The smaller split, since torchvision also loads what it fetches.
        load_image_set(data, "test", root, download=True)


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel of uint8 images (N, 3, h, w), in [0, 1]: two float64 (3,).

    Raises:
        ValueError: a channel is constant, so that it cannot be normalised.

    """
    return _statistics(_histogram(images))


def _histogram(images: Tensor) -> Tensor:
    # In parts, because bincount widens what it is given, and STL-10 holds 2.9 GB.
    parts = (part.transpose(0, 1).flatten(1) for part in images.split(4096))
    return sum((torch.stack([c.bincount(minlength=256) for c in part]) for part in parts), torch.zeros(3, 256).long())


def _statistics(counts: Tensor) -> tuple[Tensor, Tensor]:
    levels = torch.arange(256, dtype=torch.float64) / 255
    share = counts.double() / counts.sum(1, keepdim=True)
    mean = share @ levels
    std = (share @ levels.square() - mean.square()).clamp(min=0).sqrt()
    if (std < 1e-6).any():
        raise UserError("a colour channel is constant over the whole data set and cannot be normalised: other images?")
    return mean, std


def _torchvision_set(data: str, root: str, download: bool, train: bool) -> Any:
    from torchvision.datasets import CIFAR10

    name, size, load = {"cifar10": ("CIFAR-10", "170 MB", CIFAR10), "stl10": ("STL-10", "2.6 GB", stl10)}[data]
    where = f"under {str(Path(root).resolve())!r}"
    try:
        return load(root, download=download, train=train)
    except (RuntimeError, OSError) as error:
        if download:
            raise NotFoundError(f"{name} could not be downloaded and unpacked {where}: {error}") from error
        raise NotFoundError(
            f"no intact {name} {where}; get it ({size}) by allowing the download, or with: "
            f"stepwise download {data} --root {shlex.quote(root)}"
        ) from error


def _warn_of_a_folder(data: str) -> None:
    if data in DATA_SETS and Path(data).is_dir():
        rank_zero_warn(
            f"data {data!r} is the data set of this name; to mean the folder {data!r} here, write './{data}'"
        )


def _existing_folder(data: str) -> Path:
    if not data or not Path(data).is_dir():
        raise UserError(
            f"data set {data!r} is neither one of {', '.join(DATA_SETS)} nor the path of an existing folder"
        )
    return Path(data)


def _folder_set(folder: Path, split: str) -> ImageSet:
    parts, left_out = split_folder(folder)
    if split == "train":  # once for a run, which always has training images
        _tell(folder, left_out)
    classes = {name: part.class_names() for name, part in parts.items()}
    names = sorted(set().union(*classes.values()) - {""})
    number_of = {name: number for number, name in enumerate(names)} | {"": -1}
    part = parts[split]
    labels = torch.tensor([number_of[name] for name in classes[split]])
    depths = Depths()
    images = ImageSet(_in_memory(part.paths, depths), labels, names)
    if split == "train" and isinstance(images.images, Tensor):
        depths.warn(str(folder))
    return images


def _tell(folder: Path, left_out: Counter[str]) -> None:
    if left_out:
        rank_zero_info(f"left out of {str(folder)!r}: {in_words(left_out)}")


def _in_memory(paths: list[str], depths: Depths) -> Tensor | list[str]:
    """Return the images as uint8 (N, 3, h, w) if they are small and of one size, otherwise the paths."""
    shape = pixels(read_image(paths[0])).shape
    if max(shape) > _MAX_SIDE_IN_MEMORY or len(paths) * shape.numel() > _MAX_BYTES_IN_MEMORY:
        return paths
    images = torch.empty(len(paths), *shape, dtype=torch.uint8)
    for index, image in enumerate(read_all(paths, depths)):
        if image.shape != shape:
            return paths
        images[index] = image
    return images


def _folder_images(folder: Path, image_size: int) -> Tensor:
    from torchvision.transforms import v2

    listing, depths = list_images(folder), Depths()
    _tell(folder, listing.left_out)
    paths = listing.paths
    fit = v2.Compose([v2.Resize(image_size, antialias=True), v2.CenterCrop(image_size)])
    images = torch.empty(len(paths), 3, image_size, image_size, dtype=torch.uint8)
    for index, image in enumerate(read_all(paths, depths)):
        images[index] = image if image.shape[1:] == images.shape[2:] else fit(image)
    depths.warn(str(folder))
    return images
