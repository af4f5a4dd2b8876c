"""Processor time of folders of images, relative to torchvision and lightly.

1. Listing files and classes and splitting them, with a count of ignored files and a check for links (limit 4), and the
   exponent in the number of images (limit 1.15).
2. Reading all images into one tensor, relative to a loop over an ImageFolder (limit 1.5), and peak memory relative to
   the size of the images (limit 1.5).
3. Views per second of one worker from JPEG files of 500×375 pixels, relative to lightly and to torchvision's transforms
   of single PIL images: with views computed by the worker, as for training on a CPU, and with images decoded only, as
   for training on a GPU (at least 2, for views of 96 and 224 pixels, ``standard``).

The files are written to a temporary folder. Competitors alternate; the median ratio over rounds is printed.
"""

from __future__ import annotations

import io
import itertools
import math
import statistics
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from skimage import data as photographs
from timing import (
    alternate,
    argument_parser,
    check,
    check_all,
    machine,
    peak_bytes,
    processor_seconds,
    ratio,
    reset_peak_bytes,
)
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor
from views import batches_of, lightly_view, torchvision_view

from stepwise_lightning import TwoViewDataModule
from stepwise_lightning.data import load_image_set
from stepwise_lightning.data.folders import split_folder

CLASSES, SIDE = 100, 32


def make_images(folder: Path, count: int) -> Path:
    """Write ``count`` PNG files of noise in one folder for each class."""
    rng, files = np.random.default_rng(0), []
    for _ in range(50):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(buffer, "PNG")
        files.append(buffer.getvalue())
    for number in range(count):
        directory = folder / f"class_{number % CLASSES:03d}"
        if number < CLASSES:
            directory.mkdir(parents=True)
        (directory / f"{number:06d}.png").write_bytes(files[number % len(files)])
    return folder


def read_image_folder(folder: Path) -> torch.Tensor:
    """Return nine tenths of the images, like our training split."""
    peer = ImageFolder(folder, transform=pil_to_tensor)
    indices = [number for number in range(len(peer)) if number % 10 != 9]
    images = torch.empty(len(indices), 3, SIDE, SIDE, dtype=torch.uint8)
    for row, number in enumerate(indices):
        images[row] = peer[number][0]
    return images


def make_photographs(folder: Path, count: int) -> Path:
    """Write ``count`` parts of photographs of 500×375 or 375×500 pixels as JPEG files."""
    folder.mkdir()
    originals = [Image.fromarray(pixels) for pixels in (photographs.astronaut(), photographs.coffee())]
    for number in range(count):
        width, height = (500, 375) if number % 3 else (375, 500)
        enlarged = originals[number % 2].resize((700, 600))
        part = enlarged.crop((number, number // 2, number + width, number // 2 + height))
        part.save(folder / f"{number:03d}.jpg", quality=90)
    return folder


def compare_views(folder: Path, size: int, rounds: int, batch: int = 32) -> bool:
    """Check the rate of views of one size, ``standard``."""
    data = TwoViewDataModule(str(folder), image_size=size, global_batch_size=batch, num_probe_pairs=2, seed=0)
    data.setup("fit")
    loader = data.train_dataloader()
    dataset, numbers = loader.dataset, itertools.count()
    images, view = data.images("train"), torchvision_view(data, "standard", size, on_tensors=False)
    peers = {"torchvision": batches_of(images, view, batch, "picture")}
    if find_spec("lightly"):
        peers["lightly"] = batches_of(images, lightly_view(data, "standard", size), batch, "picture")

    def read() -> None:
        dataset.__getitems__([(next(numbers), index) for index in range(batch)])

    timed = {name: lambda views=views: processor_seconds(lambda: next(views)) for name, views in peers.items()}
    timed["views"] = lambda: processor_seconds(lambda: next(iter(loader)))
    timed["images"] = lambda: processor_seconds(read)
    seconds = alternate(timed, rounds)
    rates = {name: 2 * batch / statistics.median(values) for name, values in seconds.items()}
    print(f"{size} pixels, views/s: {', '.join(f'{name} {rate:.0f}' for name, rate in rates.items())}")
    ok = True
    for name in peers:
        check(f"views in the worker / {name}", ratio(seconds[name], seconds["views"]))
        ok &= check(f"decoding in the worker / {name}", ratio(seconds[name], seconds["images"]), 2.0, minimum=True)
    return ok


def main() -> int:
    """Print the ratios; return 1 if one exceeds its limit."""
    parser = argument_parser(__doc__)
    parser.add_argument("--images", type=int, default=100_000, help="number of images (default: 100000)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is timed (default: 5)")
    options = parser.parse_args()
    with TemporaryDirectory() as directory:
        small = make_images(Path(directory, "small"), options.images // 10)
        folder = make_images(Path(directory, "all"), options.images)
        listing = alternate(
            {
                "ours": lambda: processor_seconds(lambda: split_folder(folder)),
                "theirs": lambda: processor_seconds(lambda: ImageFolder(folder)),
                "a tenth": lambda: processor_seconds(lambda: split_folder(small)),
            },
            options.rounds,
        )
        reading = alternate(
            {
                "ours": lambda: processor_seconds(lambda: load_image_set(str(folder))),
                "theirs": lambda: processor_seconds(lambda: read_image_folder(folder)),
            },
            rounds=1,
        )
        before = reset_peak_bytes()
        images = load_image_set(str(folder)).images
        assert isinstance(images, torch.Tensor)
        memory = (peak_bytes() - before) / images.numel()
        large = make_photographs(Path(directory, "photographs"), 180)
        ok = all([compare_views(large, size, 2 * options.rounds) for size in (96, 224)])
    print(f"{machine()}, {options.images} images; listing "
          f"{statistics.median(listing['ours']):.2f} s, reading {reading['ours'][0]:.1f} s")  # fmt: skip
    ratios = {
        "listing and splitting / ImageFolder": (ratio(listing["ours"], listing["theirs"]), 4.0),
        "listing, exponent in the number of images": (math.log10(ratio(listing["ours"], listing["a tenth"])), 1.15),
        "reading / ImageFolder": (ratio(reading["ours"], reading["theirs"]), 1.5),
        "peak memory / images": (memory, 1.5),
    }
    return 0 if check_all(ratios) and ok else 1


if __name__ == "__main__":
    sys.exit(main())
