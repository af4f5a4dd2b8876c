"""A trained network, taken out of its run: the encoder, embeddings of images, weights for torchvision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader

from stepwise_lightning.data.image_files import list_images
from stepwise_lightning.data.image_sets import DATA_SETS, ImageSet, load_image_set
from stepwise_lightning.data.modules import TwoViewDataModule
from stepwise_lightning.data.splits import split_named
from stepwise_lightning.data.views import PlainImages, plain_view
from stepwise_lightning.encoders import ResNet
from stepwise_lightning.errors import NotFoundError, UserError, condensed, reason
from stepwise_lightning.loggers import CHECKPOINTS

__all__ = ["configured_encoder", "embed_images", "load_encoder", "torchvision_weights"]

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
    weights = _saved(path).get("state_dict", {})
    own = {name.removeprefix(_PREFIX): values for name, values in weights.items() if name.startswith(_PREFIX)}
    try:
        encoder.load_state_dict(own)
    except RuntimeError as error:
        raise UserError(
            f"{str(path)!r} does not fit the encoder of the configuration beside it: are both of one run? "
            f"({reason(error)})"
        ) from error
    return encoder.eval()


def configured_encoder(checkpoint: str | Path) -> nn.Module:
    """Return the encoder of a checkpoint's run as it was before training, from the configuration of that run.

    Raises:
        FileNotFoundError: there is no ``config.yaml`` in the folder above the checkpoint's.
        ValueError: it cannot be read, or configures no encoder.

    """
    model = configuration_of(Path(checkpoint)).get("model") or {}
    settings = model.get("init_args") if isinstance(model, dict) else None
    if not isinstance(settings, dict) or "encoder" not in settings:
        name = model.get("class_path") if isinstance(model, dict) else model
        raise UserError(
            f"the model of this run, {name}, has no argument 'encoder' to rebuild: use its own load_from_checkpoint"
        )
    return _built(nn.Module, settings["encoder"])


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


def checkpoint_of(run: str | Path) -> Path:
    """Return the newest checkpoint of a run's folder; a checkpoint itself as it is."""
    path = Path(run)
    if path.is_file():
        return path
    if not path.is_dir():
        raise NotFoundError(f"no run {str(run)!r}: give the folder of a run, runs/NAME/VERSION, or a checkpoint in it")
    saved = list((path / CHECKPOINTS).glob("[!.]*.ckpt"))
    if not saved:
        versions = sorted(str(place.parent) for place in path.glob(f"*/{CHECKPOINTS}") if any(place.glob("*.ckpt")))
        remedy = f"; give one of its runs, such as {versions[-1]!r}" if versions else ""
        raise NotFoundError(f"no checkpoint in {str(path / CHECKPOINTS)!r}{remedy}")
    return max(saved, key=lambda file: file.stat().st_mtime_ns)


def _saved(checkpoint: Path) -> dict[str, Any]:
    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch and pickle make of foreign bytes
        raise UserError(f"{str(checkpoint)!r} is no checkpoint that can be read ({reason(error)})") from error
    if not isinstance(saved, dict) or not isinstance(saved.get("state_dict"), dict):
        raise UserError(f"{str(checkpoint)!r} is no checkpoint of Lightning's: it has no state_dict")
    return saved


def configuration_of(checkpoint: Path) -> dict[str, Any]:
    """Return the configuration beside a checkpoint: of ``last-v1.ckpt`` ``config-v1.yaml``, where there is one."""
    folder = checkpoint.absolute().parent.parent
    suffix = checkpoint.stem.removeprefix("last")
    paths = [folder / f"config{suffix}.yaml", folder / "config.yaml"]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise NotFoundError(
            f"no config.yaml in {str(folder)!r}, the folder of the run that {str(checkpoint)!r} is of: `stepwise fit` "
            "writes one; or build the encoder, and give it to load_from_checkpoint(path, encoder=…)"
        )
    try:
        configuration = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{str(path)!r} cannot be read as a configuration ({reason(error)})") from error
    if not isinstance(configuration, dict):
        raise UserError(f"{str(path)!r} is no configuration of a run")
    return configuration


def _built(kind: type, settings: Any) -> Any:
    """Return the object that a part of a configuration stands for."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "part", required=True)
    try:
        return parser.instantiate_classes(parser.parse_object({"part": settings})).part
    except ArgumentError as error:
        raise UserError(f"the configuration of the run cannot be rebuilt: {condensed(str(error))}") from error


def input_settings(checkpoint: Path) -> dict[str, Any]:
    """Return what makes an image into the input of a run's encoder: ``image_size``, and ``mean``, ``std`` of channels.

    And ``augmentation``, which made it into views.

    Raises:
        ValueError: the run's data do not say it.

    """
    settings = configuration_of(checkpoint).get("data") or {}
    name = settings.get("class_path", "none") if isinstance(settings, dict) else "none"
    state = _saved(checkpoint).get(name.rpartition(".")[2])
    if not state:  # of a version that kept none: measured again
        data = _built(L.LightningDataModule, settings) if settings else None
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
    if all(folders and split_named(folders[0]) for folders in inside):
        inside = [folders[1:] for folders in inside]
    classes = sorted({folders[0] for folders in inside if folders})
    labels = [classes.index(folders[0]) if folders else -1 for folders in inside]
    return [ImageSet(paths, torch.tensor(labels), classes)], paths
