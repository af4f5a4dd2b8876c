"""Batched views: independence of the division of work, and torchvision's distributions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy.stats import chisquare, ks_1samp, ks_2samp
from scipy.stats import uniform as uniform_distribution
from torch import Tensor
from torchvision.transforms.v2 import ColorJitter, Compose, RandomApply, RandomGrayscale, RandomResizedCrop

from stepwise_lightning.data import load_images
from stepwise_lightning.data.augmentation import AugmentationParameters
from stepwise_lightning.data.batch_views import BatchTwoViews, BatchViews, crop_boxes
from stepwise_lightning.data.image_sets import load_image_set
from stepwise_lightning.seeding import uniform

STATISTICS = ((0.5, 0.45, 0.4), (0.25, 0.24, 0.26))
NUM_DRAWS = 10_000
BATCH = 40


def new_views(augmentation: str = "standard", size: int = 32, seed: int = 0) -> BatchViews:
    return BatchViews(augmentation, size, *STATISTICS, seed)


def photographs(size: int = 32) -> Tensor:
    images = load_images("photos")[: 40 * BATCH : 40]
    return torch.nn.functional.interpolate(images, size=(size, size), mode="nearest")


@pytest.mark.parametrize(("augmentation", "size"), [("standard", 32), ("weak", 24), ("barlow_twins", 128)])
def test_view_is_independent_of_the_other_images_in_the_batch(augmentation: str, size: int) -> None:
    views, images = new_views(augmentation, size), photographs(max(size, 32))
    epochs, indices = [3] * BATCH, list(range(BATCH))
    whole = torch.stack(views(images, epochs, indices))
    for parts in ([[i] for i in indices], [indices[:20], indices[20:]], [indices[::-1]], [indices[:7], indices[7:]]):
        separate = torch.empty_like(whole)
        for part in parts:
            separate[:, part] = torch.stack(views(images[part], epochs[: len(part)], part))
        assert torch.equal(separate, whole)


def test_views_are_independent_of_the_number_of_threads() -> None:
    views, images, threads = new_views(size=48), photographs(48), torch.get_num_threads()
    results = []
    for number in (1, 2):
        torch.set_num_threads(number)
        results.append(torch.stack(views(images, [0] * BATCH, range(BATCH))))
    torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_views_are_independent_of_autocast_and_default_dtype() -> None:
    views, images = new_views(), photographs()
    plain = torch.stack(views(images, [0] * BATCH, range(BATCH)))
    with torch.autocast("cpu", torch.bfloat16):
        cast = torch.stack(views(images, [0] * BATCH, range(BATCH)))
    torch.set_default_dtype(torch.float64)
    try:
        wide = torch.stack(new_views()(images, [0] * BATCH, range(BATCH)))
    finally:
        torch.set_default_dtype(torch.float32)
    assert cast.dtype == wide.dtype == torch.float32 and torch.equal(plain, cast) and torch.equal(plain, wide)


def test_seed_epoch_index_and_view_change_the_random_numbers() -> None:
    first = uniform(0, [0, 1, 0], [0, 0, 1], 1, 8)
    others = torch.cat([uniform(1, [0], [0], 1, 8), uniform(0, [0], [0], 2, 8), uniform(0, [-1], [0], 1, 8)])
    rows = torch.cat([first, others])
    assert len(rows.unique()) == rows.numel()
    assert torch.equal(uniform(0, [1], [0], 1, 8)[0], first[1])


@pytest.mark.parametrize(
    "along", ["indices", *(pytest.param(n, marks=pytest.mark.slow) for n in ("epochs", "counters"))]
)
def test_random_numbers_are_uniform_and_uncorrelated(along: str) -> None:
    number = 10**6
    zeros, counting = [0] * (number // 10), range(number // 10)
    draws = {
        "indices": lambda: uniform(7, zeros, counting, 1, 10).flatten(),
        "epochs": lambda: uniform(7, counting, zeros, 2, 10).flatten(),
        "counters": lambda: uniform(7, [0], [0], 1, number).flatten(),
    }[along]()
    assert 0 <= draws.min() and draws.max() < 1 and len(draws.unique()) == number
    assert ks_1samp(draws.numpy(), uniform_distribution.cdf).pvalue > 1e-3
    assert chisquare(torch.histc(draws, 1000, 0, 1).numpy()).pvalue > 1e-3
    centred = draws - 0.5
    for lag in (1, 2, 10):  # the variance is 1/12, and the standard error a thousandth of it
        assert (centred[lag:] * centred[:-lag]).mean().abs() < 5e-3 / 12


def test_crops_follow_torchvisions_distribution() -> None:
    torch.manual_seed(0)
    image, scale = torch.zeros(3, 32, 48), AugmentationParameters.of("standard").crop_scale
    ratio = AugmentationParameters.of("standard").crop_ratio
    theirs = torch.tensor([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(NUM_DRAWS)]).double()
    draws = uniform(0, [0] * NUM_DRAWS, range(NUM_DRAWS), 1, 22)
    ours = torch.stack(
        crop_boxes(draws[:, :20], draws[:, 20:], AugmentationParameters.of("standard"), (32, 48)), 1
    ).double()
    for name, measure in {
        "area": lambda c: c[:, 2] * c[:, 3],
        "ratio": lambda c: c[:, 3] / c[:, 2],
        "top": lambda c: c[:, 0],
        "left": lambda c: c[:, 1],
    }.items():
        assert ks_2samp(measure(ours).numpy(), measure(theirs).numpy()).pvalue > 1e-3, name


def test_crop_falls_back_to_the_largest_central_crop() -> None:
    parameters, tries = (
        AugmentationParameters((1.0, 1.0)),
        torch.rand(50, 20, generator=torch.Generator().manual_seed(0)).double(),
    )
    for shape, expected in (((10, 100), (0, 43, 10, 13)), ((100, 10), (43, 0, 13, 10))):
        top, left, height, width = crop_boxes(tries, torch.rand(50, 2).double(), parameters, shape)
        assert {tuple(crop) for crop in torch.stack([top, left, height, width], 1).tolist()} == {expected}


def test_colour_changes_follow_torchvisions_distribution() -> None:
    # An image of one colour stays uniform under jitter and grayscale, and crop and blur do not change it.
    number, parameters = 2000, AugmentationParameters.of("standard")
    assert parameters.jitter
    colour = torch.tensor([180, 120, 60], dtype=torch.uint8)[:, None, None]
    ours = new_views(size=4)(colour.expand(number, 3, 8, 8), [0] * number, range(number))[0][:, :, 0, 0]
    mean, std = (torch.tensor(values) for values in STATISTICS)
    jitter = RandomApply([ColorJitter(*parameters.jitter)], p=parameters.jitter_probability)
    theirs_view = Compose([jitter, RandomGrayscale(parameters.gray_probability)])
    torch.manual_seed(0)
    theirs = torch.stack([theirs_view(colour / 255)[:, 0, 0] for _ in range(number)])
    ours, theirs = (
        (values * 1000).round() for values in (ours * std + mean, theirs)
    )  # ties where only float32 rounding differs
    for channel in range(3):
        assert ks_2samp(ours[:, channel].numpy(), theirs[:, channel].numpy()).pvalue > 1e-3
    spread = [(values.amax(1) - values.amin(1)).numpy() for values in (ours, theirs)]
    assert ks_2samp(*spread).pvalue > 1e-3  # effect of saturation, hue and grayscale
    assert ks_2samp(ours[:, 0].numpy() * 1.05, theirs[:, 0].numpy()).pvalue < 1e-3  # control: a jitter 5 % brighter


def test_blur_and_solarisation_have_the_published_probabilities_in_each_view(monkeypatch: pytest.MonkeyPatch) -> None:
    """Barlow Twins blurs the first view always and the second rarely, and solarises a fifth of the second views."""
    number = 400
    # One bright pixel: blur spreads it, solarisation makes it dark. Without crop, flip and jitter it stays in place.
    plain = replace(
        AugmentationParameters.of("barlow_twins"), crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), blur_sigma=(1.0, 1.0),
        jitter_probability=0.0,
    )  # fmt: skip
    monkeypatch.setattr(AugmentationParameters, "of", lambda name: plain)
    image = torch.zeros(3, 9, 9, dtype=torch.uint8)
    image[:, 4, 4] = 255
    arguments = ("barlow_twins", 9, (0.0,) * 3, (1.0,) * 3)
    views = BatchViews(*arguments, 0)(image.expand(number, -1, -1, -1), [0] * number, range(number))
    blurred = [float(((view[:, 0, 4, 5] - view[:, 0, 0, 0]).abs() > 0.01).double().mean()) for view in views]
    solarized = [float((view[:, 0, 4, 4] < 0.01).double().mean()) for view in views]
    assert blurred[0] == 1 and abs(blurred[1] - 0.1) < 0.05
    assert solarized[0] == 0 and abs(solarized[1] - 0.2 * 0.9) < 0.06  # a blurred pixel is below the threshold


def test_batch_equals_single_samples() -> None:
    images = load_image_set("photos", "val")
    dataset = BatchTwoViews(images, new_views(seed=5))
    keys = [(2, index) for index in (7, 3, 100)]
    x1, x2, labels = dataset.views_of(dataset.__getitems__(keys))
    for number, key in enumerate(keys):
        first, second, label = dataset[key]
        assert torch.equal(first, x1[number]) and torch.equal(second, x2[number])
        assert label == labels[number] == images.labels[key[1]]
    assert not torch.equal(x1, x2) and len(dataset) == len(images)


@pytest.mark.gpu
def test_gpu_views_equal_cpu_views() -> None:
    views, images = new_views(), photographs()
    ours = torch.stack(views(images, [0] * BATCH, range(BATCH)))
    theirs = torch.stack(views(images.cuda(), [0] * BATCH, range(BATCH)))
    parts = [torch.stack(views(images[i : i + 1].cuda(), [0], [i])) for i in range(BATCH)]
    assert torch.allclose(ours, theirs.cpu(), atol=1e-4) and torch.equal(torch.cat(parts, 1), theirs)
