"""Batched image operations against torchvision and Pillow, image by image with the same parameters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from stepwise_lightning.data import load_images
from stepwise_lightning.data.batch_operations import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    SATURATION,
    Jitters,
    Taps,
    blur,
    grayscale,
    jitter,
    resized_crops,
    solarize,
)

NUM_IMAGES = 300
LEVELS = 255  # differences are stated in levels


@pytest.fixture(scope="module")
def photographs() -> Tensor:
    images = load_images("photos")
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:NUM_IMAGES]]


def planes_of(images: Tensor) -> Tensor:
    return images.transpose(0, 1).float().contiguous() / LEVELS


def uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def difference(planes: Tensor, images: list[Tensor]) -> float:
    return float((planes.transpose(0, 1) - torch.stack(images)).abs().max()) * LEVELS


@pytest.mark.parametrize(("extent", "size"), [(32, 32), (32, 24), (32, 48), (96, 96), (96, 20)])
def test_crop_and_flip_match_torchvision(photographs: Tensor, extent: int, size: int) -> None:
    images = torch.nn.functional.interpolate(photographs[:60], size=(extent, extent + 4), mode="nearest")
    draws = uniform(5, len(images))
    height, width = (1 + draws[0] * extent).long(), (1 + draws[1] * (extent + 4)).long()
    top, left = (draws[2] * (extent - height + 1)).long(), (draws[3] * (extent + 5 - width)).long()
    flip = draws[4] < 0.5
    rows = Taps.of_crops(top, height, extent, size, factor=1 / LEVELS)
    planes = resized_crops(images, rows, Taps.of_crops(left, width, extent + 4, size, flip))
    theirs = []
    for image, i, j, h, w, mirror in zip(images.float() / LEVELS, top, left, height, width, flip, strict=True):
        crop = F.resized_crop(image, i, j, h, w, [size, size], InterpolationMode.BILINEAR, antialias=True)
        theirs.append(crop.flip(-1) if mirror else crop)
    assert difference(planes, theirs) < 1.5e-3


@pytest.mark.parametrize(
    ("operation", "theirs"),
    [(BRIGHTNESS, F.adjust_brightness), (CONTRAST, F.adjust_contrast), (SATURATION, F.adjust_saturation)],
)
def test_brightness_contrast_and_saturation_match_torchvision(
    photographs: Tensor, operation: int, theirs: object
) -> None:
    factors = torch.ones(NUM_IMAGES, 3, dtype=torch.float64)
    factors[:, operation] = 0.4 + 1.2 * uniform(NUM_IMAGES)
    order = torch.arange(4).expand(NUM_IMAGES, 4)
    planes = jitter(planes_of(photographs), Jitters.of(factors, torch.zeros(NUM_IMAGES).double(), order))
    expected = [
        theirs(image, float(factor))  # type: ignore[operator]
        for image, factor in zip(photographs.float() / LEVELS, factors[:, operation], strict=True)
    ]
    assert difference(planes, expected) < 1e-3


def test_hue_matches_torchvision_and_pillow_within_rounding(photographs: Tensor) -> None:
    hue = uniform(NUM_IMAGES) - 0.5
    ones, order = torch.ones(NUM_IMAGES, 3, dtype=torch.float64), torch.arange(4).expand(NUM_IMAGES, 4)
    planes = jitter(planes_of(photographs), Jitters.of(ones, hue, order))
    turned = [F.adjust_hue(image, float(h)) for image, h in zip(photographs.float() / LEVELS, hue, strict=True)]
    assert difference(planes, turned) < 2e-3
    pillow = [
        F.pil_to_tensor(F.adjust_hue(Image.fromarray(image.permute(1, 2, 0).numpy()), float(h))) / LEVELS
        for image, h in zip(photographs, hue, strict=True)
    ]
    assert difference(planes, pillow) < 14  # 8-bit saturation is imprecise for dark pixels


def test_jitter_uses_the_order_of_each_image(photographs: Tensor) -> None:
    factors, hue = 0.6 + 0.8 * uniform(NUM_IMAGES, 3), 0.2 * uniform(NUM_IMAGES) - 0.1
    order = uniform(NUM_IMAGES, 4).argsort(1)
    order = order[(order == HUE).long().argmax(1).argsort()]
    planes = jitter(planes_of(photographs), Jitters.of(factors, hue, order))
    functions = {BRIGHTNESS: F.adjust_brightness, CONTRAST: F.adjust_contrast, SATURATION: F.adjust_saturation}
    expected, backwards = [], []
    for number, image in enumerate(photographs.float() / LEVELS):
        results = []
        for turns in (order[number].tolist(), order[number].tolist()[::-1]):
            result = image
            for turn in turns:
                if turn == HUE:
                    result = F.adjust_hue(result, float(hue[number]))
                else:
                    result = functions[turn](result, float(factors[number, turn]))
            results.append(result)
        expected.append(results[0])
        backwards.append(results[1])
    assert difference(planes, expected) < 4e-3
    assert difference(planes, backwards) > 10  # control: another order gives another image


def test_grayscale_matches_torchvision(photographs: Tensor) -> None:
    chosen = torch.arange(0, NUM_IMAGES, 3)
    planes = grayscale(planes_of(photographs), chosen)
    expected = list(photographs.float() / LEVELS)
    for number in chosen.tolist():
        expected[number] = F.rgb_to_grayscale(expected[number], 3)
    assert difference(planes, expected) < 1e-3


def test_blur_matches_pillow_within_rounding(photographs: Tensor) -> None:
    sigma = 0.1 + 1.9 * uniform(NUM_IMAGES)
    planes = blur(planes_of(photographs), sigma)
    theirs = []
    for image, s in zip(photographs, sigma.tolist(), strict=True):
        blurred = Image.fromarray(image.permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(s))
        theirs.append(torch.from_numpy(np.array(blurred)).permute(2, 0, 1) / LEVELS)
    assert difference(planes, theirs) < 3.5  # six roundings, one after each pass
    assert difference(planes, list(photographs.float() / LEVELS)) > 50  # control: the images are blurred


def test_blur_preserves_the_mean_and_has_the_requested_variance() -> None:
    sigma = torch.tensor([0.3, 1.0, 1.5, 2.0], dtype=torch.float64)
    point = torch.zeros(3, 4, 31, 31)
    point[:, :, 15, 15] = 1.0
    blurred = blur(point, sigma).double()
    places = torch.arange(31, dtype=torch.float64) - 15
    assert torch.allclose(blurred.sum((-1, -2)), torch.ones(3, 4).double(), atol=1e-6)
    variance = (blurred.sum(-1) * places.square()).sum(-1)
    assert torch.allclose(variance, sigma.square().expand(3, 4), rtol=1e-5)


def test_solarisation_equals_pillow(photographs: Tensor) -> None:
    chosen = torch.arange(0, NUM_IMAGES, 2)
    planes = solarize(planes_of(photographs), chosen)
    theirs = [
        F.pil_to_tensor(F.solarize(Image.fromarray(image.permute(1, 2, 0).numpy()), 128)) if i % 2 == 0 else image
        for i, image in enumerate(photographs)
    ]
    assert difference(planes, [image / LEVELS for image in theirs]) < 1e-3
