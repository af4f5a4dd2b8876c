"""Use a trained network: load the encoder of a run, embed images, export weights; features of any network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader

from stepwise_lightning.asynchronous import to_device
from stepwise_lightning.data.folders import list_images, split_name
from stepwise_lightning.data.image_sets import DATA_SETS, ImageSet, existing_folder, load_image_set
from stepwise_lightning.data.views import PlainImages, plain_view
from stepwise_lightning.data.workers import prepare_worker
from stepwise_lightning.encoders import ResNet
from stepwise_lightning.errors import UserError
from stepwise_lightning.features import capture, on_device
from stepwise_lightning.runs.saved import (
    checkpoint_of,
    class_and_arguments,
    configuration_of,
    configured_encoder,
    load_weights,
    saved_checkpoint,
)


def load_encoder(run: str | Path) -> nn.Module:
    """Return the trained encoder of a run, on the CPU, in evaluation mode: ``load_encoder(folder)(images)``.

    The encoder is rebuilt from ``config.yaml`` in the folder of the run, and gets the weights of the newest checkpoint.
    The checkpoint is read as tensors and plain values (``weights_only=True``); classes that the configuration names are
    imported, as by ``stepwise fit``.

    Args:
        run: the folder of a run, ``runs/<name>/<version>``, or a checkpoint in it.

    Raises:
        FileNotFoundError: the run, its checkpoint or its configuration does not exist.
        ValueError: the configuration has no encoder, the checkpoint does not fit it, or a file is damaged.

    """
    path = checkpoint_of(run)
    encoder = configured_encoder(path)
    load_weights(encoder, path)
    return encoder.eval()


class OnAccelerator(nn.Module):
    """Module on a GPU, if ``accelerator`` is ``gpu`` or there is one, with inputs and outputs on the CPU."""

    def __init__(self, module: nn.Module, accelerator: str = "auto") -> None:
        super().__init__()
        kinds = {"cuda": CUDAAccelerator, "mps": MPSAccelerator}
        found = next((kind for kind, accelerator in kinds.items() if accelerator.is_available()), None)
        if accelerator not in ("auto", "gpu", "cpu") or (accelerator == "gpu" and found is None):
            raise UserError(f"accelerator {accelerator!r} is not available: use auto, cpu{', gpu' if found else ''}")
        self.device = torch.device("cpu" if accelerator == "cpu" else found or "cpu")
        self.module = module.to(self.device)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output on the CPU."""
        return self.module(to_device(x, self.device)).cpu()


@torch.no_grad()
def embed_images(
    run: str | Path,
    data: str,
    root: str = "data",
    batch_size: int = 256,
    progress: Callable[[Any], Any] = iter,
    accelerator: str = "auto",
    num_workers: int = 0,
) -> dict[str, np.ndarray]:
    """Return the embeddings of images under the trained encoder of a run.

    Images are preprocessed as held-out images of the run: resized and cropped at the centre to the size of its views,
    and normalised with the statistics of its training images.

    Args:
        run: see :func:`load_encoder`; its data must be a ``TwoViewDataModule``.
        data: a folder of images, whose first-level subfolders are the classes (folders ``train/``, ``val/`` and
            ``test/`` above them are merged); or ``photos``, ``cifar10`` or ``stl10``, training images first.
        root: folder of ``cifar10`` and ``stl10``.
        batch_size: number of images in a forward pass.
        progress: wraps the iterable of batches, for instance ``tqdm``.
        accelerator: ``auto`` for a GPU if there is one, ``gpu`` or ``cpu``.
        num_workers: processes that read images.

    Returns:
        ``embeddings`` float32 (n, d); ``hidden`` float32 (n, m), the output of the encoder's ``backbone``, if it has
        one; ``labels`` int64 (n,), −1 where unknown; ``class_names``; ``paths`` (n,), of files, or set/split/index.

    Raises:
        ValueError, FileNotFoundError: see :func:`load_encoder` and :func:`load_image_set`; no images are found; the
            accelerator is not available.

    """
    encoder, settings = load_encoder(run), input_settings(checkpoint_of(run))
    view = plain_view(settings["image_size"], settings["mean"], settings["std"])
    sets, paths = all_images(data, root)
    dataset: ConcatDataset[Any] = ConcatDataset([PlainImages(images, view) for images in sets])
    loader = DataLoader(dataset, batch_size, num_workers=num_workers, worker_init_fn=prepare_worker)
    embeddings, hidden, labels = [], [], []
    backbone = getattr(encoder, "backbone", None)
    if isinstance(backbone, nn.Module):
        backbone.register_forward_hook(lambda module, inputs, output: hidden.append(output.cpu()))
    network = OnAccelerator(encoder, accelerator)
    for x, label in progress(loader):
        embeddings.append(network(x))
        labels.append(label)
    arrays = {"embeddings": torch.cat(embeddings).numpy(), "labels": torch.cat(labels).numpy()}
    if hidden:
        arrays["hidden"] = torch.cat(hidden).numpy()
    return arrays | {"class_names": np.array(sets[0].class_names, dtype=str), "paths": np.array(paths)}


def image_features(
    network: nn.Module,
    data: str,
    transform: Callable[[Any], Tensor],
    watch: str = "",
    root: str = "data",
    batch_size: int = 64,
) -> Tensor:
    """Return the features of images under any network, such as a pretrained network of torchvision.

    Example:
        The rank of the features of a ResNet before its classifier, on a folder of images::

            weights = torchvision.models.ResNet18_Weights.DEFAULT
            network = torchvision.models.resnet18(weights=weights)
            rankme(image_features(network, "path/to/images", weights.transforms(), watch="avgpool"))

    Args:
        network: runs in evaluation mode, on its device; its state does not change.
        data: a folder of images, ``photos``, ``cifar10`` or ``stl10``, see :func:`embed_images`.
        transform: function from a PIL image to a tensor (3, h, w) of one size.
        watch: name of a submodule; ``""`` for the output of the network.
        root: folder of ``cifar10`` and ``stl10``.
        batch_size: number of images in a forward pass.

    Returns:
        (n, d), on the CPU, in the order of the files; outputs with more dimensions are flattened.

    Raises:
        ValueError, FileNotFoundError: no images, or an unknown submodule.

    """
    sets = [PlainImages(images, transform) for images in all_images(data, root)[0]]
    loader: DataLoader[Any] = DataLoader(ConcatDataset(sets), batch_size)
    batches = (on_device([x], network) for x, _ in loader)
    return torch.cat([capture(network, x, [watch], running_statistics=True)[watch][0].cpu() for x in batches])


def torchvision_weights(run: str | Path) -> dict[str, Tensor]:
    """Return the weights of a run's ResNet under torchvision's names, without the classifier ``fc``.

    A ``resnet18`` with torchvision's stem loads with
    ``torchvision.models.resnet18(weights=None).load_state_dict(weights, strict=False)``. With ``small_images``, the
    network has a 3×3 ``conv1`` without stride, and no ``maxpool``.

    Args:
        run: see :func:`load_encoder`.

    Raises:
        ValueError, FileNotFoundError: see :func:`load_encoder`; or neither the encoder nor its ``backbone`` is a
            ``ResNet``.

    """
    encoder = load_encoder(run)
    backbone = encoder if isinstance(encoder, ResNet) else getattr(encoder, "backbone", None)
    if not isinstance(backbone, ResNet):
        raise UserError(
            f"only a ResNet can be exported for torchvision, and the encoder of this run is {type(encoder).__name__}: "
            "use load_encoder(run).state_dict()"
        )
    return {name: values.contiguous() for name, values in backbone.network.state_dict().items()}


def input_settings(checkpoint: Path) -> dict[str, Any]:
    """Return ``image_size``, ``mean`` and ``std`` of channels, and ``augmentation`` of a run's images."""
    name, settings = class_and_arguments(configuration_of(checkpoint), "data")
    state = saved_checkpoint(checkpoint).get(name.rpartition(".")[2])
    if not state or "image_size" not in state:
        raise UserError(
            f"the data of this run, {name or 'none'}, have no image_size, mean and std, which TwoViewDataModule keeps "
            "in checkpoints: embed tensors with load_encoder(run) in Python"
        )
    augmentation = settings.get("augmentation", "standard")
    return {name: state[name] for name in ("image_size", "mean", "std")} | {"augmentation": augmentation}


def all_images(data: str, root: str) -> tuple[list[ImageSet], list[str]]:
    """Return all images of a folder or a data set, and the name of each."""
    if data in DATA_SETS:
        sets = [load_image_set(data, split, root) for split in ("train", "val")]
        names = zip(("train", "val"), sets, strict=True)
        return sets, [f"{data}/{split}/{index}" for split, images in names for index in range(len(images))]
    paths = list_images(existing_folder(data)).paths
    folders = [Path(path).relative_to(data).parts[:-1] for path in paths]
    if all(parts and split_name(parts[0]) for parts in folders):
        folders = [parts[1:] for parts in folders]
    classes = sorted({parts[0] for parts in folders if parts})
    labels = [classes.index(parts[0]) if parts else -1 for parts in folders]
    return [ImageSet(paths, torch.tensor(labels), classes)], paths
