"""A trained network, taken out of its run: the encoder, embeddings of images, weights for torchvision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader

from stepwise_lightning.data.folders import list_images, split_name
from stepwise_lightning.data.image_sets import DATA_SETS, ImageSet, load_image_set
from stepwise_lightning.data.two_view_datamodule import TwoViewDataModule
from stepwise_lightning.data.views import PlainImages, plain_view
from stepwise_lightning.encoders import ResNet
from stepwise_lightning.errors import UserError, reason
from stepwise_lightning.runs.saved import (
    checkpoint_of,
    configuration_of,
    configured_encoder,
    instantiate,
    saved_checkpoint,
)

__all__ = ["embed_images", "load_encoder", "torchvision_weights"]

_PREFIX = "encoder."


def load_encoder(run: str | Path) -> nn.Module:
    """Return the trained encoder of a run, on the CPU, in evaluation mode: ``load_encoder(folder)(images)``.

    It is rebuilt from ``config.yaml`` in the folder of the run, and gets the weights of its newest checkpoint. That is
    read as tensors and plain values (``weights_only=True``); the configuration names classes, which are imported as
    ``stepwise fit`` would.

    Args:
        run: the folder of a run, ``runs/<name>/<version>``, or one of the checkpoints in it.

    Raises:
        FileNotFoundError: no such run, no checkpoint in it, or no configuration beside it.
        ValueError: the configuration has no encoder, or one that the checkpoint does not fit; damaged files.

    """
    path = checkpoint_of(run)
    encoder = configured_encoder(path)
    weights = saved_checkpoint(path).get("state_dict", {})
    own = {name.removeprefix(_PREFIX): values for name, values in weights.items() if name.startswith(_PREFIX)}
    try:
        encoder.load_state_dict(own)
    except RuntimeError as error:
        raise UserError(
            f"{str(path)!r} does not fit the encoder of the configuration beside it: are both of one run? "
            f"({reason(error)})"
        ) from error
    return encoder.eval()


@torch.no_grad()
def embed_images(
    run: str | Path, data: str, root: str = "data", batch_size: int = 256, progress: Callable[[Any], Any] = iter
) -> dict[str, np.ndarray]:
    """Return what the trained encoder of a run makes of images, which are seen as the run's held-out images are.

    They are resized and cropped at the centre to the size of the run's views, and normalised with the statistics of its
    training images.

    Args:
        run: see :func:`load_encoder`; its data must be a ``TwoViewDataModule``.
        data: the path of a folder, whose images are all taken (those of ``train/``, ``val/``, ``test/`` where it has
            these), with first-level subfolders as classes; or ``photos``, ``cifar10``, ``stl10``, training images
            before held-out ones.
        root: where ``cifar10`` and ``stl10`` lie.
        batch_size: images at a time.
        progress: put around the batches, for instance ``tqdm``.

    Returns:
        ``embeddings`` float32 (n, d); ``hidden`` float32 (n, m), what the encoder's ``backbone`` puts out, where it has
        one; ``labels`` int64 (n,), −1 where unknown; ``class_names``; ``paths`` (n,), of files, or set/split/number.

    Raises:
        ValueError, FileNotFoundError: see :func:`load_encoder` and :func:`load_image_set`; no images.

    """
    encoder, settings = load_encoder(run), input_settings(checkpoint_of(run))
    view = plain_view(settings["image_size"], settings["mean"], settings["std"])
    sets, paths = all_images(data, root)
    loader: DataLoader[Any] = DataLoader(ConcatDataset([PlainImages(images, view) for images in sets]), batch_size)
    embeddings, hidden, labels = [], [], []
    backbone = getattr(encoder, "backbone", None)
    if isinstance(backbone, nn.Module):
        backbone.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    for x, label in progress(loader):
        embeddings.append(encoder(x))
        labels.append(label)
    arrays = {"embeddings": torch.cat(embeddings).numpy(), "labels": torch.cat(labels).numpy()}
    if hidden:
        arrays["hidden"] = torch.cat(hidden).numpy()
    return arrays | {"class_names": np.array(sets[0].class_names, dtype=str), "paths": np.array(paths)}


def torchvision_weights(run: str | Path) -> dict[str, Tensor]:
    """Return the weights of a run's ResNet by the names that torchvision gives them, without its classifier ``fc``.

    ``torchvision.models.resnet18(weights=None).load_state_dict(weights, strict=False)`` takes those of a ``resnet18``
    with torchvision's stem. Where the run has ``small_images``, its ``conv1`` is 3×3 without stride, and ``maxpool``
    nothing.

    Args:
        run: see :func:`load_encoder`.

    Raises:
        ValueError, FileNotFoundError: see :func:`load_encoder`; the encoder has no ResNet as its ``backbone``.

    """
    encoder = load_encoder(run)
    backbone = encoder if isinstance(encoder, ResNet) else getattr(encoder, "backbone", None)
    if not isinstance(backbone, ResNet):
        raise UserError(
            f"only a ResNet can become weights for torchvision, and this run has {type(encoder).__name__}: "
            "load_encoder(run).state_dict() has its weights"
        )
    return {name: values.contiguous() for name, values in backbone.network.state_dict().items()}


def input_settings(checkpoint: Path) -> dict[str, Any]:
    """Return what makes an image into the input of a run's encoder: ``image_size``, and ``mean``, ``std`` of channels.

    And ``augmentation``, which made it into views.

    Raises:
        ValueError: the run's data do not say it.

    """
    settings = configuration_of(checkpoint).get("data") or {}
    name = settings.get("class_path", "none") if isinstance(settings, dict) else "none"
    state = saved_checkpoint(checkpoint).get(name.rpartition(".")[2])
    if not state:  # of a version that kept none: measured again
        data = instantiate(L.LightningDataModule, settings) if settings else None
        if not isinstance(data, TwoViewDataModule):
            raise UserError(
                f"the data of this run, {name}, do not say how an image becomes its input: "
                "load_encoder(run) in Python embeds tensors"
            )
        data.setup("fit")
        state = data.state_dict()
    augmentation = (settings.get("init_args") or {}).get("augmentation", "standard")
    return {name: state[name] for name in ("image_size", "mean", "std")} | {"augmentation": augmentation}


def all_images(data: str, root: str) -> tuple[list[ImageSet], list[str]]:
    """Return all images of a folder or a data set, and what each is called."""
    if data in DATA_SETS:
        sets = [load_image_set(data, split, root) for split in ("train", "val")]
        names = zip(("train", "val"), sets, strict=True)
        return sets, [f"{data}/{split}/{index}" for split, images in names for index in range(len(images))]
    if not Path(data).is_dir():
        raise UserError(f"data {data!r} is neither one of {', '.join(DATA_SETS)} nor the path of an existing folder")
    paths = list_images(Path(data)).paths
    inside = [Path(path).relative_to(data).parts[:-1] for path in paths]
    if all(folders and split_name(folders[0]) for folders in inside):
        inside = [folders[1:] for folders in inside]
    classes = sorted({folders[0] for folders in inside if folders})
    labels = [classes.index(folders[0]) if folders else -1 for folders in inside]
    return [ImageSet(paths, torch.tensor(labels), classes)], paths
