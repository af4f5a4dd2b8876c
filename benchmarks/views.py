"""Speed of two augmented views relative to other libraries, and in training: ``make benchmark``.

1. Images per second of our loader relative to other pipelines, with equal photographs, image size, batch and
   augmentation: lightly's and torchvision's transforms of single PIL images, torchvision's transforms v2 of single
   tensors, and kornia's of batches. torchvision's transforms of a batch are listed too, though they draw one crop and
   one jitter for a whole batch.
2. A training step of the small ResNet with batched augmentation and channels-last weights, relative to augmentation of
   single images and contiguous weights, as in version 0.1.0.

One thread, no workers, processor time. Competitors alternate; the median ratio over rounds is printed with its range.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import islice
from typing import Any

import torch
from PIL import Image, ImageFilter
from timing import alternate, argument_parser, check, machine
from torch import Tensor, nn
from torchvision.transforms import v2

from stepwise_lightning import BarlowTwins, Encoder, TwoViewDataModule
from stepwise_lightning.data.augmentation import AugmentationParameters
from stepwise_lightning.data.image_sets import ImageSet

BLUR_SIZE = 9  # of the kernels of torchvision and kornia; Pillow's blur reaches as far at the largest σ
# augmentation, size of images and of views: minimum ratio to lightly's, maximum ratio of steps
CASES = {("weak", 32, 24): (12.0, 0.72), ("standard", 32, 32): (8.0, 0.6), ("standard", 96, 96): (2.3, None)}


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


class PillowBlur:
    """Pillow's Gaussian blur of random strength."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the blurred image."""
        return image.filter(ImageFilter.GaussianBlur(torch.empty(()).uniform_(self.low, self.high).item()))


def torchvision_view(data: TwoViewDataModule, augmentation: str, size: int, on_tensors: bool) -> v2.Transform:
    """Return torchvision's transform with the parameters of our augmentation, of PIL images or of uint8 tensors."""
    ours = AugmentationParameters.of(augmentation)
    steps: list[Any] = [v2.RandomResizedCrop(size, ours.crop_scale, ours.crop_ratio), v2.RandomHorizontalFlip()]
    to_float = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    steps = [*to_float, *steps] if on_tensors else steps
    if ours.jitter:
        blur = v2.GaussianBlur(BLUR_SIZE, ours.blur_sigma) if on_tensors else PillowBlur(*ours.blur_sigma)
        steps += [
            v2.RandomApply([v2.ColorJitter(*ours.jitter)], p=ours.jitter_probability),
            v2.RandomGrayscale(ours.gray_probability),
            v2.RandomApply([blur], p=ours.blur_probability[0]),
        ]
    return v2.Compose([*steps, *([] if on_tensors else to_float), v2.Normalize(data.mean, data.std)])


def lightly_view(data: TwoViewDataModule, augmentation: str, size: int) -> Callable[[Any], Tensor]:
    """Return lightly's transform with the parameters of our augmentation."""
    from lightly.transforms import SimCLRViewTransform

    ours = AugmentationParameters.of(augmentation)
    bright, contrast, saturation, hue = ours.jitter or (0.0, 0.0, 0.0, 0.0)
    return SimCLRViewTransform(
        input_size=size, cj_prob=ours.jitter_probability, cj_strength=1.0, cj_bright=bright, cj_contrast=contrast,
        cj_sat=saturation, cj_hue=hue, min_scale=ours.crop_scale[0], random_gray_scale=ours.gray_probability,
        gaussian_blur=ours.blur_probability[0], sigmas=ours.blur_sigma, vf_prob=0.0, hf_prob=0.5, rr_prob=0.0,
        normalize={"mean": list(data.mean), "std": list(data.std)},
    )  # fmt: skip


def kornia_view(data: TwoViewDataModule, augmentation: str, size: int) -> Callable[[Tensor], Tensor]:
    """Return kornia's transform of a uint8 batch with the parameters of our augmentation."""
    from kornia import augmentation as kornia

    ours = AugmentationParameters.of(augmentation)
    steps: list[nn.Module] = [
        kornia.RandomResizedCrop((size, size), ours.crop_scale, ours.crop_ratio),
        kornia.RandomHorizontalFlip(p=0.5),
    ]
    if ours.jitter:
        steps += [
            kornia.ColorJitter(*ours.jitter, p=ours.jitter_probability),
            kornia.RandomGrayscale(p=ours.gray_probability),
            kornia.RandomGaussianBlur((BLUR_SIZE, BLUR_SIZE), ours.blur_sigma, p=ours.blur_probability[0]),
        ]
    view = nn.Sequential(*steps, kornia.Normalize(torch.tensor(data.mean), torch.tensor(data.std)))
    return lambda images: view(images / 255)


def batches_of(
    images: ImageSet, view: Callable[[Any], Tensor], batch: int, kind: str
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield batches of two views; ``view`` is applied to each ``picture``, to each ``tensor`` or to each ``batch``."""
    while True:
        for indices in torch.randperm(len(images))[: len(images) // batch * batch].split(batch):
            if kind == "picture":
                samples = [images.picture(index) for index in indices.tolist()]
                views = [torch.stack([view(sample) for sample in samples]) for _ in range(2)]
            elif kind == "tensor":
                views = [torch.stack([view(image) for image in images.images[indices]]) for _ in range(2)]
            else:
                views = [view(images.images[indices]) for _ in range(2)]
            yield *views, images.labels[indices]  # type: ignore[misc]


def peers(data: TwoViewDataModule, augmentation: str, size: int, batch: int) -> dict[str, Iterator[Any]]:
    """Return the pipelines of the installed libraries."""
    images = data.images("train")
    single, tensors = (torchvision_view(data, augmentation, size, on_tensors) for on_tensors in (False, True))
    pipelines = {
        "torchvision's of PIL images": batches_of(images, single, batch, "picture"),
        "torchvision's of tensors": batches_of(images, tensors, batch, "tensor"),
        "torchvision's, one draw for a batch": batches_of(images, tensors, batch, "batch"),
    }
    if find_spec("kornia"):
        pipelines["kornia's of batches"] = batches_of(images, kornia_view(data, augmentation, size), batch, "batch")
    if find_spec("lightly"):
        pipelines["lightly's"] = batches_of(images, lightly_view(data, augmentation, size), batch, "picture")
    if missing := [name for name in ("kornia", "lightly") if not find_spec(name)]:
        print(f"  no comparison with {' and '.join(missing)}, not installed: pip install --group peers")
    return pipelines


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
    others, few = peers(data, augmentation, size, batch), max(1, batches // 8)
    timed = {name: lambda loader=loader: processor_seconds_of(loader, few) / few for name, loader in others.items()}
    timed["ours"] = lambda: processor_seconds_of(data.train_dataloader(), batches) / batches
    seconds = alternate(timed, rounds)
    print(f"  ours: {2 * batch / statistics.median(seconds['ours']):.0f} views/s; ratio of views/s to")
    for name in others:
        ok &= check_median(name, seconds[name], seconds["ours"], min_speedup if "light" in name else None, minimum=True)
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
                peers(data, augmentation, size, batch)["torchvision's of PIL images"], batches, before
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
