"""Two augmented views: images per second against lightly's pipeline, and their part in training: ``make benchmark``.

1. Our loader over lightly's, with the same photographs, image size, batch, strengths and probabilities.
2. A training step of the small ResNet, views made in batches and weights channels-last, over the same step with views
   made one by one and contiguous weights, which is how version 0.1.0 did it.

One thread, no workers, seconds of the processor, so that other work on the machine changes little. Competitors
alternate; the median ratio of the rounds counts, and the smallest and largest are printed beside it.
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
from timing import alternate, within
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from stepwise_lightning import BarlowTwins, Encoder, TwoViewDataModule
from stepwise_lightning.data.augmentation import AugmentationParameters
from stepwise_lightning.data.image_sets import ImageSet
from stepwise_lightning.data.views import TwoViews, random_view

# augmentation, size of images and of views: least ratio to lightly's, largest ratio of steps
CASES = {("weak", 32, 24): (12.0, 0.72), ("standard", 32, 32): (8.0, 0.6), ("standard", 96, 96): (2.3, None)}


class TheirViews(Dataset[Any]):
    """The same photographs through a transform of lightly's, which returns the views of one image."""

    def __init__(self, images: ImageSet, transform: Callable[[Any], list[Tensor]]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        x1, x2 = self.transform(self.images.picture(index))
        return x1, x2, int(self.images.labels[index])


class SizedPhotographs(TwoViewDataModule):
    """The bundled photographs, enlarged to ``side`` pixels before the views are made."""

    def __init__(self, side: int, **settings: Any) -> None:
        super().__init__("photos", **settings)
        self.side = side

    def images(self, split: str) -> ImageSet:
        """Return a split."""
        images = super().images(split)
        assert isinstance(images.images, Tensor)
        if images.images.shape[-1] != self.side:
            enlarged = nn.functional.interpolate(images.images.float(), size=(self.side, self.side), mode="bilinear")
            self._sets[split] = images = ImageSet(enlarged.to(torch.uint8), images.labels, images.class_names)
        return images


def their_loader(data: TwoViewDataModule, augmentation: str, size: int, batch: int) -> DataLoader[Any]:
    """Return lightly's pipeline with the strengths of our augmentation."""
    from lightly.transforms import SimCLRTransform

    ours = AugmentationParameters.of(augmentation)
    bright, contrast, saturation, hue = ours.jitter or (0.0, 0.0, 0.0, 0.0)
    transform = SimCLRTransform(
        input_size=size, cj_prob=ours.jitter_probability, cj_strength=1.0, cj_bright=bright, cj_contrast=contrast,
        cj_sat=saturation, cj_hue=hue, min_scale=ours.crop_scale[0], random_gray_scale=ours.gray_probability,
        gaussian_blur=ours.blur_probability, sigmas=ours.blur_sigma, vf_prob=0.0, hf_prob=0.5, rr_prob=0.0,
        normalize={"mean": list(data.mean), "std": list(data.std)},
    )  # fmt: skip
    return DataLoader(TheirViews(data.images("train"), transform), batch, shuffle=True, drop_last=True)


def one_by_one(data: TwoViewDataModule, augmentation: str, size: int, batch: int) -> DataLoader[Any]:
    """Return our views as folders of large images have them."""
    views = TwoViews(data.images("train"), random_view(augmentation, size, data.mean, data.std), seed=0)
    addresses = [(0, index) for index in range(len(views))]
    return DataLoader(views, batch, sampler=addresses, drop_last=True)


def seconds_over(loader: Any, batches: int, method: BarlowTwins | None = None) -> float:
    """Return seconds for so many batches, trained on where there is a method."""
    optimizer = None if method is None else torch.optim.SGD(method.parameters(), lr=1e-3, momentum=0.9)
    iterator = iter(loader)
    next(iterator)
    start = time.process_time()
    for x1, x2, _ in islice(iterator, batches):
        if method is not None and optimizer is not None:
            optimizer.zero_grad()
            method.loss(method(x1), method(x2)).backward()
            optimizer.step()
    return time.process_time() - start


def medians(name: str, one: list[float], other: list[float], limit: float | None, least: bool = False) -> bool:
    """Print the median ratio with its range; return whether it keeps the limit."""
    ratios = [a / b for a, b in zip(one, other, strict=True)]
    return within(f"{name} [{min(ratios):.3g} to {max(ratios):.3g}]", statistics.median(ratios), limit, least)


def compare(augmentation: str, side: int, size: int, batch: int, rounds: int, batches: int) -> bool:
    """Print the ratios of one case; ``batches`` is at most an epoch of 2190 photographs."""
    least, most = CASES[augmentation, side, size]
    data = SizedPhotographs(side, augmentation=augmentation, image_size=size, global_batch_size=batch)
    data.setup("fit")
    print(f"\n{augmentation}, {side}×{side} to {size}×{size}, batches of {batch}")
    ok = True
    if find_spec("lightly"):
        theirs = their_loader(data, augmentation, size, batch)
        few = max(1, batches // 8)
        timed = {
            "ours": lambda: seconds_over(data.train_dataloader(), batches) / batches,
            "theirs": lambda: seconds_over(theirs, few) / few,
        }
        seconds = alternate(timed, rounds)
        each = 2 * batch / statistics.median(seconds["ours"])
        ok &= medians(f"images/s, ours ({each:.0f}) / lightly's", seconds["theirs"], seconds["ours"], least, least=True)
    else:
        print("  not compared with lightly, which is not installed: pip install -e '.[peers]'")
    if most is not None and batch == 64:
        ok &= compare_steps(data, augmentation, size, batch, rounds, batches, most)
    return ok


def compare_steps(
    data: TwoViewDataModule, augmentation: str, size: int, batch: int, rounds: int, batches: int, most: float
) -> bool:
    """Print a training step over that of version 0.1.0."""
    before, now = new_method(), new_method()
    before.encoder.to(memory_format=torch.contiguous_format)
    seconds = alternate(
        {
            "before": lambda: seconds_over(one_by_one(data, augmentation, size, batch), batches, before),
            "now": lambda: seconds_over(data.train_dataloader(), batches, now),
        },
        rounds,
    )
    step = 1e3 * statistics.median(seconds["now"]) / batches
    return medians(f"training step ({step:.1f} ms) / that of 0.1.0", seconds["now"], seconds["before"], most)


def new_method() -> BarlowTwins:
    """Return the small network of the figures."""
    return BarlowTwins(
        Encoder(64, alpha=1e-3), 1e-3, momentum=0.9, off_diagonal_weight=1.0, normalize=False, center=True
    )


def main() -> int:
    """Print the ratios; return 1 if one misses its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="how often each is timed (default: 7)")
    parser.add_argument("--batches", type=int, default=24, help="batches of 64 a round (default: 24)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, 1 thread, torch {torch.__version__}; medians of {options.rounds} rounds [range]")
    ok = True
    for augmentation, side, size in CASES:
        for batch in (64, 512):
            batches = max(1, min(options.batches * 64, 2 * 1024) // batch)
            ok &= compare(augmentation, side, size, batch, options.rounds, batches)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
