"""Images, and the two views made of them.

Image sets come as one uint8 tensor (N, 3, height, width) in memory: ``photos`` (bundled), ``cifar10``, or a folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import repeat
from pathlib import Path

import lightning as L
import torch
from torch import Tensor

DATA_SETS = ("photos", "cifar10")


def load_images(data: str, root: str = "data", download: bool = False, image_size: int = 32) -> Tensor:
    """Return all images of a data set as uint8, (N, 3, image_size, image_size).

    Args:
        data: ``photos`` (see :func:`photo_tiles`), ``cifar10`` (the training images), or the path of a folder that
            is searched for image files at any depth.
        root: where ``cifar10`` is looked for, and put.
        download: fetch ``cifar10`` if it is not there.
        image_size: images in a folder that differ are resized (shorter side) and cropped at the centre.

    Raises:
        ValueError: unknown data set, or a folder without readable images.
        FileNotFoundError: ``cifar10`` is not there and was not asked to be downloaded.

    """
    if data == "photos":
        return photo_tiles()
    if data == "cifar10":
        return _cifar10_images(root, download)
    if Path(data).is_dir():
        return _folder_images(Path(data), image_size)
    raise ValueError(f"data set {data!r} is neither one of {', '.join(DATA_SETS)} nor the path of an existing folder")


@lru_cache(maxsize=1)
def photo_tiles(size: int = 32, stride: int = 12, shrink: int = 3, min_std: float = 5.0) -> Tensor:
    """Return tiles of the photographs that scikit-image ships inside its wheel, uint8, (2690, 3, 32, 32) by default.

    Eight colour photographs are shrunk ``shrink`` times by averaging and cut into tiles; tiles whose pixels have a
    standard deviation of at most ``min_std`` (of 255) are dropped. Needs no network; the order is fixed.
    """
    import numpy as np
    from skimage import data
    from skimage.transform import downscale_local_mean

    photographs = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), data.hubble_deep_field()]
    photographs += [data.retina(), data.immunohistochemistry(), data.stereo_motorcycle()[0]]
    tiles = []
    for photograph in photographs:
        small = np.rint(downscale_local_mean(photograph, (shrink, shrink, 1))).astype(np.uint8)
        windows = np.lib.stride_tricks.sliding_window_view(small, (size, size, 3))[::stride, ::stride, 0]
        windows = windows.reshape(-1, size, size, 3)
        tiles.append(windows[windows.std(axis=(1, 2, 3)) > min_std])
    return torch.from_numpy(np.concatenate(tiles)).permute(0, 3, 1, 2).contiguous()


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel of uint8 images (N, 3, h, w), in [0, 1]: two float64 (3,).

    Raises:
        ValueError: a channel is constant, so that it cannot be normalised.

    """
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)])
    share = counts.double() / counts.sum(1, keepdim=True)
    mean = share @ levels
    std = (share @ levels.square() - mean.square()).clamp(min=0).sqrt()
    if (std < 1e-6).any():
        raise ValueError("a colour channel is constant over the whole data set and cannot be normalised: other images?")
    return mean, std


def crop_pairs(images: Tensor, num_pairs: int, crop_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw ``num_pairs`` images without repetition and return two independent random crops of each.

    Pixels are normalised per channel with the statistics of all ``images``.

    Args:
        images: uint8, (N, 3, h, w).
        num_pairs: n ≤ N.
        crop_size: side of the square crops, ≤ min(h, w).
        seed: of the choice of images and of the crops' positions.

    Returns:
        First and second views, float32, (n, 3, crop_size, crop_size) each.

    Raises:
        ValueError: ``num_pairs`` or ``crop_size`` out of range.

    """
    total, _, height, width = images.shape
    if not 1 <= num_pairs <= total:
        raise ValueError(f"{num_pairs} pairs asked for, but the data set has {total} images: choose 1 to {total}")
    if not 1 <= crop_size <= min(height, width):
        raise ValueError(f"crops of {crop_size}×{crop_size} do not fit the images of {height}×{width} pixels")
    mean, std = channel_statistics(images)
    generator = torch.Generator().manual_seed(seed)
    chosen = images[torch.randperm(total, generator=generator)[:num_pairs]]
    rows = torch.randint(height - crop_size + 1, (2, num_pairs), generator=generator)
    columns = torch.randint(width - crop_size + 1, (2, num_pairs), generator=generator)
    views = []
    for top, left in zip(rows.tolist(), columns.tolist(), strict=True):
        crops = [image[:, i : i + crop_size, j : j + crop_size] for image, i, j in zip(chosen, top, left, strict=True)]
        normalised = (torch.stack(crops) / 255.0 - mean[:, None, None]) / std[:, None, None]
        views.append(normalised.float())
    return views[0], views[1]


class FixedCropPairs(L.LightningDataModule):
    """The data of the linear experiment: pairs of random crops, drawn once, given as one full batch at every step.

    Args:
        data: see :func:`load_images`.
        num_pairs: see :func:`crop_pairs`, as the next two.
        crop_size: side of the crops in pixels.
        seed: of the draw.
        steps_per_epoch: how often the batch is repeated before Lightning counts an epoch.
        root: see :func:`load_images`, as ``download``.
        download: fetch the data set if it is not there.

    Attributes:
        x1, x2: the views after ``setup``, float32, (num_pairs, 3, crop_size, crop_size).

    Raises (in ``setup``):
        ValueError, FileNotFoundError: see :func:`load_images` and :func:`crop_pairs`.

    """

    x1: Tensor
    x2: Tensor

    def __init__(
        self,
        data: str = "photos",
        num_pairs: int = 500,
        crop_size: int = 20,
        seed: int = 0,
        steps_per_epoch: int = 1000,
        root: str = "data",
        download: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def prepare_data(self) -> None:
        """Download, if asked to (one process only)."""
        if self.hparams["data"] == "cifar10" and self.hparams["download"]:
            _cifar10_images(self.hparams["root"], download=True)

    def setup(self, stage: str | None = None) -> None:
        """Load the images and cut the pairs."""
        if not hasattr(self, "x1"):
            h = self.hparams
            images = load_images(h["data"], h["root"], h["download"])
            self.x1, self.x2 = crop_pairs(images, h["num_pairs"], h["crop_size"], h["seed"])

    def train_dataloader(self) -> _Repeated:
        """Return the full batch (x1, x2), ``steps_per_epoch`` times."""
        return _Repeated((self.x1, self.x2), self.hparams["steps_per_epoch"])


class _Repeated:
    """An iterable of one batch, many times over: a DataLoader would copy it at every step."""

    def __init__(self, batch: tuple[Tensor, Tensor], times: int) -> None:
        self.batch, self.times = batch, times

    def __len__(self) -> int:
        return self.times

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return repeat(self.batch, self.times)


def _cifar10_images(root: str, download: bool) -> Tensor:
    from torchvision.datasets import CIFAR10

    try:
        images = CIFAR10(root, train=True, download=download).data
    except RuntimeError as error:
        raise FileNotFoundError(
            f"no CIFAR-10 under {str(Path(root).resolve())!r}; get it (170 MB) by allowing the download, or with: "
            f"python -c \"import torchvision; torchvision.datasets.CIFAR10('{root}', download=True)\""
        ) from error
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _folder_images(folder: Path, image_size: int) -> Tensor:
    from PIL import UnidentifiedImageError
    from torchvision.datasets.folder import IMG_EXTENSIONS, pil_loader
    from torchvision.transforms import v2
    from tqdm import tqdm

    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS and path.is_file())
    if not paths:
        raise ValueError(f"no images in {str(folder)!r}: expected files ending in {', '.join(IMG_EXTENSIONS)}")
    fit = v2.Compose([v2.Resize(image_size, antialias=True), v2.CenterCrop(image_size)])
    images = torch.empty(len(paths), 3, image_size, image_size, dtype=torch.uint8)
    for index, path in enumerate(tqdm(paths, desc="reading images", leave=False, delay=1)):
        try:
            image = v2.functional.pil_to_tensor(pil_loader(str(path)))
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{str(path)!r} cannot be read as an image ({error}): remove or repair it") from error
        images[index] = image if image.shape[1:] == images.shape[2:] else fit(image)
    return images
