"""The images that modes are looked at with, and the embeddings of their views."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepwise_lightning.data.augmentation import AugmentationParameters
from stepwise_lightning.data.batch_views import BatchViews
from stepwise_lightning.data.image_files import pixels
from stepwise_lightning.data.image_sets import ImageSet, load_image_set
from stepwise_lightning.data.views import plain_view
from stepwise_lightning.errors import UserError
from stepwise_lightning.modes import variations
from stepwise_lightning.runs.saved import configuration_of
from stepwise_lightning.trained import all_images

__all__ = ["ALL_TOGETHER", "LEAST_IMAGES", "RANDOM_VIEWS", "chosen_pictures", "embedded_views"]

ALL_TOGETHER = "all together"
LEAST_IMAGES = 4
RANDOM_VIEWS = 4
# A picture is shrunk to so many times the side of a view, or each view of it would cost as much as a photo.
_LARGEST = 3


def chosen_pictures(
    checkpoint: Path, data: str | None, root: str | None, num_images: int
) -> tuple[list[Callable[[], Any]], Tensor, list[str], list[str]]:
    """Return functions that read the chosen images, their labels, what these stand for, and the images' names."""
    if data is None:
        own = (configuration_of(checkpoint).get("data") or {}).get("init_args") or {}
        held_out = load_image_set(own.get("data", "photos"), "val", root or own.get("root", "data"))
        names = held_out.images if isinstance(held_out.images, list) else None
        sets = [held_out]
        paths = names or [f"{own.get('data', 'photos')}/val/{index}" for index in range(len(held_out))]
    else:
        sets, paths = all_images(data, root or "data")
    places = [(images, index) for images in sets for index in range(len(images))]
    if len(places) < LEAST_IMAGES:
        raise UserError(f"{len(places)} images are too few to see a mode in: give at least {LEAST_IMAGES} with --data")
    chosen = torch.linspace(0, len(places) - 1, min(num_images, len(places))).round().long().unique().tolist()

    def reader(images: ImageSet, index: int) -> Callable[[], Any]:
        return lambda: images.picture(index)

    labels = torch.tensor([int(places[number][0].labels[places[number][1]]) for number in chosen])
    return [reader(*places[number]) for number in chosen], labels, sets[0].class_names, [paths[n] for n in chosen]


@torch.no_grad()
def embedded_views(
    encoder: nn.Module,
    pictures: list[Callable[[], Any]],
    settings: dict[str, Any],
    strengths: AugmentationParameters,
    around: Callable[..., Any],
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return plain inputs (n, 3, s, s), embeddings of random views (n, views, d), and of varied ones by parameter."""
    from torchvision.transforms.v2.functional import resize

    size, mean, std = (settings[name] for name in ("image_size", "mean", "std"))
    plain, drawn = plain_view(size, mean, std), BatchViews(settings["augmentation"], size, mean, std, seed=0)
    centre, spread = (torch.tensor(values)[:, None, None] for values in (mean, std))
    inputs, random, varied = list[Tensor](), list[Tensor](), dict[str, list[Tensor]]()
    for number, read in enumerate(around(pictures, desc="views of images")):
        picture = read()
        inputs.append(plain(picture))
        if min(picture.size) > _LARGEST * size:
            picture = resize(picture, [_LARGEST * size])
        image = pixels(picture)
        epochs, half = range(RANDOM_VIEWS // 2), RANDOM_VIEWS // 2
        views = {ALL_TOGETHER: torch.cat(drawn(image.expand(half, -1, -1, -1), epochs, [number] * half))}
        views |= {
            name: (view - centre) / spread for name, view in variations.varied_views(image, strengths, size).items()
        }
        embeddings = encoder(torch.cat(list(views.values())).float()).split([len(view) for view in views.values()])
        for name, z in zip(views, embeddings, strict=True):
            (random if name == ALL_TOGETHER else varied.setdefault(name, [])).append(z)
    return torch.stack(inputs), torch.stack(random), {name: torch.stack(z) for name, z in varied.items()}
