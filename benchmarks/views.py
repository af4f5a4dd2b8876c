"""Images per second of our two augmented views against lightly's, in one run: ``make benchmark``.

The same photographs, image size, batch, number of workers, and strengths and probabilities of the augmentation; the
loader alone, and training the small ResNet on what it gives. Each ratio is to be at least 1.

Both alternate, and the median ratio of the rounds counts, so that drift of the machine cancels.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from itertools import islice
from typing import Any

import torch
from timing import alternate, ratio, within
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from stepwise_lightning import Encoder, TwoViewDataModule
from stepwise_lightning.data.image_sets import ImageSet

BATCH, IMAGE_SIZE = 64, 32


class TheirViews(Dataset[Any]):
    """The same photographs through a transform of lightly's, which returns the views of one image."""

    def __init__(self, images: ImageSet, transform: Callable[[Any], list[Tensor]]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        x1, x2 = self.transform(self.images.picture(index))
        return x1, x2, int(self.images.labels[index])


def their_loader(data: TwoViewDataModule, workers: int) -> DataLoader[Any]:
    """Return lightly's pipeline with the strengths of our standard augmentation."""
    from lightly.transforms import SimCLRTransform

    transform = SimCLRTransform(
        input_size=IMAGE_SIZE, cj_prob=0.8, cj_strength=1.0, cj_bright=0.4, cj_contrast=0.4, cj_sat=0.2, cj_hue=0.1,
        min_scale=0.2, random_gray_scale=0.2, gaussian_blur=0.5, sigmas=(0.1, 2.0), vf_prob=0.0, hf_prob=0.5,
        rr_prob=0.0, normalize={"mean": list(data.mean), "std": list(data.std)},
    )  # fmt: skip
    views = TheirViews(data.images("train"), transform)
    return DataLoader(views, BATCH, shuffle=True, drop_last=True, num_workers=workers)


def seconds_over(loader: Any, batches: int, network: nn.Module | None) -> float:
    """Return seconds for so many batches, trained on where there is a network."""
    iterator = iter(loader)
    next(iterator)  # workers have started
    start = time.perf_counter()
    for x1, x2, _ in islice(iterator, batches):
        if network is not None:
            network(torch.cat([x1, x2])).square().mean().backward()
    return time.perf_counter() - start


def compare(workers: int, rounds: int, batches: int) -> bool:
    """Print images per second, ours over theirs; batches ≤ 33, one epoch of the photographs."""
    data = TwoViewDataModule("photos", image_size=IMAGE_SIZE, global_batch_size=BATCH, num_workers=workers)
    data.setup("fit")
    theirs = their_loader(data, workers)
    print(f"\n{IMAGE_SIZE}×{IMAGE_SIZE}, standard augmentation, {workers} workers; ours / lightly's images per second")
    ok = True
    for name, network in (("loader alone", None), ("training the small ResNet", Encoder(64))):
        timed = {
            "ours": lambda n=network: seconds_over(data.train_dataloader(), batches, n),
            "theirs": lambda n=network: seconds_over(theirs, batches, n),
        }
        seconds = alternate(timed, rounds)
        each = 2 * BATCH * batches / statistics.median(seconds["ours"])
        ok &= within(f"{name} (ours {each:.0f})", ratio(seconds["theirs"], seconds["ours"]), 1.0, least=True)
    return ok


def main() -> int:
    """Print the ratios; return 1 if one is below 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often each is timed (default: 5)")
    parser.add_argument("--batches", type=int, default=12, help="batches a round, up to 33 (default: 12)")
    options = parser.parse_args()
    if find_spec("lightly") is None:
        print("views not compared: lightly is not installed (pip install -e '.[peers]')")
        return 0
    torch.set_num_threads(1)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; medians of rounds")
    return 0 if all([compare(workers, options.rounds, options.batches) for workers in (0, 2)]) else 1


if __name__ == "__main__":
    sys.exit(main())
