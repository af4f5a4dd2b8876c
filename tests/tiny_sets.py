"""Small image folders, CIFAR-10 and STL-10 in their real formats with a few images, and damaged files."""

import hashlib
import io
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10, STL10

from stepwise_lightning.data.photographs import cut_photos

CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
STL_CLASSES = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def fill(folder: Path, count: int = 3, seed: int = 0, size: tuple[int, int] = (12, 12)) -> Path:
    """Write ``count`` images of noise, 00.png, 01.png, …, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.fromarray(noise(*size, 3, seed=100 * seed + number)).save(folder / f"{number:02d}.png")
    return folder


def enlarged_tiles(count: int, seed: int) -> np.ndarray:
    tiles = cut_photos()[0].permute(0, 2, 3, 1).numpy()
    chosen = np.random.default_rng(seed).permutation(len(tiles))[:count]
    return tiles[chosen].repeat(3, 1).repeat(3, 2)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def old_pickle(content: dict) -> bytes:
    """Return a pickle in the format of the published files: protocol 2, with arrays and dtypes of NumPy of 2009."""

    class Pickler(pickle._Pickler):  # the pure-Python pickler, whose reducers can be overridden
        def reducer_override(self, value):
            if isinstance(value, np.dtype):
                return np.dtype, ("u1", 0, 1), (3, "|", None, None, None, -1, -1, 0)
            return NotImplemented

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(content)
    return buffer.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def write_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write four images into each of the six files of CIFAR-10 in its real format; return ``root``."""
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    for number, (name, _) in enumerate(CIFAR10.train_list + CIFAR10.test_list):
        labels = [(number + k) % 10 for k in range(4)]
        content = {"data": noise(4, 3072, seed=number), "labels": labels, "batch_label": "tiny", "filenames": ["x.png"]}
        (folder / name).write_bytes(old_pickle(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": CIFAR_CLASSES, "num_vis": 3072}, protocol=2))
    for attribute in ("train_list", "test_list"):
        names = [name for name, _ in getattr(CIFAR10, attribute)]
        monkeypatch.setattr(CIFAR10, attribute, [[name, md5(folder / name)] for name in names])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5(folder / "batches.meta")})
    return root


def write_stl10(
    root: Path, monkeypatch: pytest.MonkeyPatch, train: int = 2, test: int = 2, photographs: bool = False
) -> Path:
    """Write a few training, three unlabelled and a few test images in the real format of STL-10; return ``root``.

    The format stores columns first, and labels from 1. Images are noise or enlarged tiles of the bundled photographs.
    """
    folder = root / STL10.base_folder
    folder.mkdir(parents=True)
    for seed, (name, count) in enumerate({"train": train, "unlabeled": 3, "test": test}.items()):
        images = enlarged_tiles(count, seed) if photographs else noise(count, 96, 96, 3, seed=seed)
        images.transpose(0, 3, 2, 1).tofile(folder / f"{name}_X.bin")
        np.arange(9, 9 + count).clip(max=10).astype(np.uint8).tofile(folder / f"{name}_y.bin")
    (folder / "unlabeled_y.bin").unlink()
    (folder / "class_names.txt").write_text("\n".join(STL_CLASSES) + "\n")
    for attribute in ("train_list", "test_list"):
        names = [name for name, _ in getattr(STL10, attribute)]
        monkeypatch.setattr(STL10, attribute, [[name, md5(folder / name)] for name in names])
    return root


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Return the content of a file truncated, with up to 8 bytes overwritten, or with up to 64 bytes set to zero."""
    kind = draw.choice(("cut", "bytes", "blank"))
    if kind == "cut":
        return content[: draw.randrange(len(content))]
    changed = bytearray(content)
    if kind == "bytes":
        for _ in range(draw.randint(1, 8)):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
    else:
        start = draw.randrange(len(changed))
        end = min(len(changed), start + draw.randint(1, 64))
        changed[start:end] = bytes(end - start)
    return bytes(changed)


class Touch:
    """Create a file when unpickled, as malicious code in a pickle could."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)
