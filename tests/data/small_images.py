"""Small images, streams of them, and data modules with one configuration."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tiny_sets import noise
from torch import Tensor

from stepwise_lightning import TwoViewDataModule

SIDE = 20
VAL = [Image.fromarray(noise(SIDE, SIDE, 3, seed=1000 + number)) for number in range(5)]


def picture(number: int) -> Image.Image:
    """Return an image of noise; there are four sizes."""
    return Image.fromarray(noise(SIDE + number % 2, SIDE + number % 4 // 2, 3, seed=number))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


class Stream:
    """Images 0 to 29 as pairs (image, id), with the ids from ``start``."""

    def __init__(self, count: int = 30, start: int = 0) -> None:
        self.count, self.start = count, start

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        return ((picture(number), self.start + number) for number in range(self.count))


class TarStream:
    """Encoded images and their names from a tar file that is read from its start to its end, as in webdataset."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[tuple[bytes, str]]:
        with tarfile.open(self.path, "r|") as tar:
            for member in tar:
                yield tar.extractfile(member).read(), member.name


def write_tar(path: Path, count: int = 30) -> Path:
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            content = encoded(picture(number))
            member = tarfile.TarInfo(f"{number:03d}.png")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def module(data: Any, **settings: Any) -> TwoViewDataModule:
    defaults = {"augmentation": "standard", "image_size": 8, "global_batch_size": 8, "num_probe_pairs": 2, "seed": 0}
    module = TwoViewDataModule(data, **(defaults | settings))
    module.setup("fit")
    return module


def epoch(data: TwoViewDataModule, number: int = 0) -> Tensor:
    """Return the views of all training batches of an epoch, (batches, 2, n, 3, h, w)."""
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    return torch.stack([torch.stack([x1, x2]) for x1, x2, _ in loader])
