"""What a folder of many small images costs, against torchvision's ImageFolder, by processor time.

1. Finding the files and their classes and splitting them, which also counts what is left out and looks for links (limit
   4 times ImageFolder), and how that grows with the number of images (exponent at most 1.15).
2. Reading all of them into one tensor, against a loop over an ImageFolder (limit 1.5), and the memory that this takes
   besides the images themselves (limit 0.5 of them).

The files are made in a temporary folder; the two alternate, and the median of the rounds' ratios is printed.
"""

from __future__ import annotations

import argparse
import io
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from timing import alternate, fresh_peak_bytes, peak_bytes, ratio, within
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

from stepwise_lightning.data import load_image_set
from stepwise_lightning.data.folders import split_folder

CLASSES, SIDE = 100, 32


def make_images(folder: Path, count: int) -> Path:
    """Write so many PNG files of noise, in folders of classes."""
    draw, files = np.random.default_rng(0), []
    for _ in range(50):
        buffer = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(buffer, "PNG")
        files.append(buffer.getvalue())
    for number in range(count):
        place = folder / f"class_{number % CLASSES:03d}"
        if number < CLASSES:
            place.mkdir(parents=True)
        (place / f"{number:06d}.png").write_bytes(files[number % len(files)])
    return folder


def seconds(work: Callable[[], object]) -> float:
    """Return the processor time that it takes."""
    start = time.process_time()
    work()
    return time.process_time() - start


def read_image_folder(folder: Path) -> torch.Tensor:
    """Return nine tenths of the images, as ours are split."""
    peer = ImageFolder(folder, transform=pil_to_tensor)
    chosen = [number for number in range(len(peer)) if number % 10 != 9]
    images = torch.empty(len(chosen), 3, SIDE, SIDE, dtype=torch.uint8)
    for place, number in enumerate(chosen):
        images[place] = peer[number][0]
    return images


def main() -> int:
    """Print the ratios; return 1 if one is over its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000, help="in the folder (default: 100000)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is timed (default: 5)")
    options = parser.parse_args()
    with TemporaryDirectory() as place:
        small = make_images(Path(place, "small"), options.images // 10)
        folder = make_images(Path(place, "all"), options.images)
        found = alternate(
            {
                "ours": lambda: seconds(lambda: split_folder(folder)),
                "theirs": lambda: seconds(lambda: ImageFolder(folder)),
                "a tenth": lambda: seconds(lambda: split_folder(small)),
            },
            options.rounds,
        )
        read = alternate(
            {
                "ours": lambda: seconds(lambda: load_image_set(str(folder))),
                "theirs": lambda: seconds(lambda: read_image_folder(folder)),
            },
            rounds=1,
        )
        before = fresh_peak_bytes()
        images = load_image_set(str(folder)).images
        assert isinstance(images, torch.Tensor)
        memory = (peak_bytes() - before) / images.numel()
    print(f"{platform.machine()}, torch {torch.__version__}, {options.images} images; finding "
          f"{statistics.median(found['ours']):.2f} s, reading {read['ours'][0]:.1f} s")  # fmt: skip
    ratios = {
        "finding and splitting / ImageFolder": (ratio(found["ours"], found["theirs"]), 4.0),
        "finding, exponent in the number of images": (math.log10(ratio(found["ours"], found["a tenth"])), 1.15),
        "reading / ImageFolder": (ratio(read["ours"], read["theirs"]), 1.5),
        "memory, images and all else / images": (memory, 1.5),
    }
    return 0 if all([within(name, value, limit) for name, (value, limit) in ratios.items()]) else 1


if __name__ == "__main__":
    sys.exit(main())
