"""Images on which modes are described, and the embeddings of their views."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from stepwise_lightning.data.augmentation import AugmentationParameters
from stepwise_lightning.data.batch_views import BatchViews
from stepwise_lightning.data.image_files import pixels
from stepwise_lightning.data.own_images import any_image_set, imported_data
from stepwise_lightning.data.views import plain_view
from stepwise_lightning.data.workers import prepare_worker
from stepwise_lightning.errors import UserError
from stepwise_lightning.modes.variations import varied_views
from stepwise_lightning.runs.saved import class_and_arguments, configuration_of
from stepwise_lightning.trained import all_images

ALL_TOGETHER = "all together"
MIN_IMAGES = 4
RANDOM_VIEWS = 4
_MAX_SCALE = 3  # images are shrunk to this multiple of the views' side, because large images make views slow


def choose_images(
    checkpoint: Path, data: str | None, root: str | None, num_images: int
) -> tuple[list[Callable[[], Any]], Tensor, list[str], list[str]]:
    """Return functions that read the chosen images, their labels, the class names, and the paths of the images."""
    if num_images < MIN_IMAGES:
        raise UserError(f"num_images must be at least {MIN_IMAGES}, got {num_images}")
    if data is None:
        _, settings = class_and_arguments(configuration_of(checkpoint), "data")
        data = settings.get("data", "photos")
        if not isinstance(data, str):
            raise UserError("the data of this run are a data set that cannot be loaded again: give images with --data")
        held_out = any_image_set(imported_data(data), "val", root or settings.get("root", "data"))
        names = [f"{data}/val/{index}" for index in range(len(held_out))]
        sets, paths = [held_out], held_out.images if isinstance(held_out.images, list) else names
    else:
        sets, paths = all_images(data, root or "data")
    places = [(images, index) for images in sets for index in range(len(images))]
    if len(places) < MIN_IMAGES:
        raise UserError(f"{len(places)} images are too few to describe modes: give at least {MIN_IMAGES} with --data")
    chosen = torch.linspace(0, len(places) - 1, min(num_images, len(places))).round().long().unique().tolist()
    readers: list[Callable[[], Any]] = [partial(places[number][0].picture, places[number][1]) for number in chosen]
    labels = torch.cat([images.labels for images in sets])[chosen]
    names = sets[0].class_names + [str(label) for label in range(len(sets[0].class_names), int(labels.max()) + 1)]
    return readers, labels, names, [paths[number] for number in chosen]


class _Views(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Centre crop (3, s, s) of each image, and its views (views, 3, s, s) by the parameter that differs."""

    def __init__(self, readers: list[Callable[[], Any]], settings: dict[str, Any]) -> None:
        self.size, mean, std = (settings[name] for name in ("image_size", "mean", "std"))
        self.readers, self.parameters = readers, AugmentationParameters.of(settings["augmentation"])
        self.plain = plain_view(self.size, mean, std)
        self.random_views = BatchViews(settings["augmentation"], self.size, mean, std, seed=0)
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (mean, std))

    def __len__(self) -> int:
        return len(self.readers)

    def __getitem__(self, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        from torchvision.transforms.v2.functional import resize

        picture, half = self.readers[number](), RANDOM_VIEWS // 2
        plain = self.plain(picture)
        if min(picture.size) > _MAX_SCALE * self.size:
            picture = resize(picture, [_MAX_SCALE * self.size])
        image = pixels(picture)
        random_views = self.random_views(image.expand(half, -1, -1, -1), range(half), [number] * half)
        varied = varied_views(image, self.parameters, self.size)
        views = {name: (view - self.mean) / self.std for name, view in varied.items()}
        return plain, {ALL_TOGETHER: torch.cat(random_views)} | views


@torch.no_grad()
def embed_views(
    encoder: nn.Module,
    readers: list[Callable[[], Any]],
    settings: dict[str, Any],
    progress: Callable[..., Any],
    num_workers: int = 0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return centre crops (n, 3, s, s), and embeddings of views (n, views, d) by the parameter that differs.

    The first entry, ``all together``, has random views as in training.
    """
    loader = DataLoader(
        _Views(readers, settings),
        batch_size=None,
        num_workers=num_workers,
        generator=torch.Generator(),  # otherwise the loader draws from the global generator
        worker_init_fn=prepare_worker,
    )
    inputs, embeddings = list[Tensor](), dict[str, list[Tensor]]()
    for plain, views in progress(loader, desc="views of images"):
        inputs.append(plain)
        z = encoder(torch.cat(list(views.values())).float())
        for name, part in zip(views, z.split([len(view) for view in views.values()]), strict=True):
            embeddings.setdefault(name, []).append(part)
    return torch.stack(inputs), {name: torch.stack(parts) for name, parts in embeddings.items()}
