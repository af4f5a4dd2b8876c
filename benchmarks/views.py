"""Speed of two augmented views relative to lightly's pipeline, and in training: ``make benchmark``.

1. Images per second of our loader relative to lightly's, with equal photographs, image size, batch and augmentation.
2. A training step of the small ResNet with batched augmentation and channels-last weights, relative to augmentation of
   single images and contiguous weights, as in version 0.1.0.

One thread, no workers, processor time. Competitors alternate; the median ratio over rounds is printed with its range.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from itertools import islice
from typing import Any

import torch
from timing import alternate, argument_parser, check, machine
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from stepwise_lightning import BarlowTwins, Encoder, TwoViewDataModule
from stepwise_lightning.data.augmentation import AugmentationParameters
from stepwise_lightning.data.image_sets import ImageSet
from stepwise_lightning.data.views import TwoViews, random_views

# augmentation, size of images and of views: minimum ratio to lightly's, maximum ratio of steps
CASES = {("weak", 32, 24): (12.0, 0.72), ("standard", 32, 32): (8.0, 0.6), ("standard", 96, 96): (2.3, None)}


class LightlyViews(Dataset[Any]):
    """Views of the same photographs from a lightly transform of single images."""

    def __init__(self, images: ImageSet, transform: Callable[[Any], list[Tensor]]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        x1, x2 = self.transform(self.images.picture(index))
        return x1, x2, int(self.images.labels[index])


class SizedPhotographs(TwoViewDataModule):
    """The bundled photographs, enlarged to ``side`` pixels before augmentation."""

    def __init__(self, side: int, **settings: Any) -> None:
        super().__init__("photos", **settings)
        self.side = side

    def images(self, split: str) -> ImageSet:
        """Return the enlarged images of a split."""
        images = super().images(split)
        assert isinstance(images.images, Tensor)
        if images.images.shape[-1] != self.side:
            enlarged = nn.functional.interpolate(images.images.float(), size=(self.side, self.side), mode="bilinear")
            self._sets[split] = images = ImageSet(enlarged.to(torch.uint8), images.labels, images.class_names)
        return images


def lightly_loader(data: TwoViewDataModule, augmentation: str, size: int, batch: int) -> DataLoader[Any]:
    """Return lightly's pipeline with the parameters of our augmentation."""
    from lightly.transforms import SimCLRTransform

    ours = AugmentationParameters.of(augmentation)
    bright, contrast, saturation, hue = ours.jitter or (0.0, 0.0, 0.0, 0.0)
    transform = SimCLRTransform(
        input_size=size, cj_prob=ours.jitter_probability, cj_strength=1.0, cj_bright=bright, cj_contrast=contrast,
        cj_sat=saturation, cj_hue=hue, min_scale=ours.crop_scale[0], random_gray_scale=ours.gray_probability,
        gaussian_blur=ours.blur_probability, sigmas=ours.blur_sigma, vf_prob=0.0, hf_prob=0.5, rr_prob=0.0,
        normalize={"mean": list(data.mean), "std": list(data.std)},
    )  # fmt: skip
    return DataLoader(LightlyViews(data.images("train"), transform), batch, shuffle=True, drop_last=True)


def single_image_loader(data: TwoViewDataModule, augmentation: str, size: int, batch: int) -> DataLoader[Any]:
    """Return our views from single images, as for folders of large images."""
    views = TwoViews(data.images("train"), random_views(augmentation, size, data.mean, data.std), seed=0)
    sampler = [(0, index) for index in range(len(views))]
    return DataLoader(views, batch, sampler=sampler, drop_last=True)


def processor_seconds_of(loader: Any, batches: int, method: BarlowTwins | None = None) -> float:
    """Return processor seconds for a number of batches, with training steps if ``method`` is given."""
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


def check_median(name: str, one: list[float], other: list[float], limit: float | None, minimum: bool = False) -> bool:
    """Print the median ratio with its range; return whether it meets the limit."""
    ratios = [a / b for a, b in zip(one, other, strict=True)]
    return check(f"{name} [{min(ratios):.3g} to {max(ratios):.3g}]", statistics.median(ratios), limit, minimum)


def compare(augmentation: str, side: int, size: int, batch: int, rounds: int, batches: int) -> bool:
    """Check one case; ``batches`` is at most an epoch of 2190 photographs."""
    min_speedup, max_step = CASES[augmentation, side, size]
    data = SizedPhotographs(side, augmentation=augmentation, image_size=size, global_batch_size=batch)
    data.setup("fit")
    print(f"\n{augmentation}, {side}×{side} to {size}×{size}, batches of {batch}")
    ok = True
    if find_spec("lightly"):
        lightly = lightly_loader(data, augmentation, size, batch)
        few = max(1, batches // 8)
        timed = {
            "ours": lambda: processor_seconds_of(data.train_dataloader(), batches) / batches,
            "theirs": lambda: processor_seconds_of(lightly, few) / few,
        }
        seconds = alternate(timed, rounds)
        images_per_second = 2 * batch / statistics.median(seconds["ours"])
        ok &= check_median(
            f"images/s, ours ({images_per_second:.0f}) / lightly's",
            seconds["theirs"],
            seconds["ours"],
            min_speedup,
            minimum=True,
        )
    else:
        print("  no comparison with lightly, which is not installed: pip install -e '.[peers]'")
    if max_step is not None and batch == 64:
        ok &= compare_steps(data, augmentation, size, batch, rounds, batches, max_step)
    return ok


def compare_steps(
    data: TwoViewDataModule, augmentation: str, size: int, batch: int, rounds: int, batches: int, max_step: float
) -> bool:
    """Check a training step relative to version 0.1.0."""
    before, now = new_method(), new_method()
    before.encoder.to(memory_format=torch.contiguous_format)
    seconds = alternate(
        {
            "before": lambda: processor_seconds_of(
                single_image_loader(data, augmentation, size, batch), batches, before
            ),
            "now": lambda: processor_seconds_of(data.train_dataloader(), batches, now),
        },
        rounds,
    )
    step = 1e3 * statistics.median(seconds["now"]) / batches
    return check_median(f"training step ({step:.1f} ms) / version 0.1.0", seconds["now"], seconds["before"], max_step)


def new_method() -> BarlowTwins:
    """Return the small ResNet of the figures."""
    return BarlowTwins(
        Encoder(64, alpha=1e-3), 1e-3, momentum=0.9, off_diagonal_weight=1.0, normalize=False, center=True
    )


def main() -> int:
    """Print the ratios; return 1 if one misses its limit."""
    parser = argument_parser(__doc__, rounds=7)
    parser.add_argument("--batches", type=int, default=24, help="batches of 64 per round (default: 24)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}; medians of {options.rounds} rounds [range]")
    ok = True
    for augmentation, side, size in CASES:
        for batch in (64, 512):
            batches = max(1, min(options.batches * 64, 2 * 1024) // batch)
            ok &= compare(augmentation, side, size, batch, options.rounds, batches)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
