"""Describe the learned modes of a run: example images, attributes, invariances and sensitivity."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepwise_lightning.errors import UserError
from stepwise_lightning.modes import attributes, variations
from stepwise_lightning.modes.description import ModeDescription
from stepwise_lightning.modes.directions import Modes
from stepwise_lightning.modes.images import ALL_TOGETHER, RANDOM_VIEWS, choose_images, embed_views
from stepwise_lightning.modes.sensitivity import mean_gradients, occlusion_maps
from stepwise_lightning.runs.saved import checkpoint_of, class_and_arguments, configuration_of
from stepwise_lightning.spectrum.matrices import MATRICES
from stepwise_lightning.spectrum.record import SpectrumRecord
from stepwise_lightning.trained import OnAccelerator, input_settings, load_encoder

NUM_IMAGES = 256
_NUM_SHOWN = 6  # images at each end and in the middle of a mode
_NUM_MAPS = 3  # images at each end with an occlusion map
_NUM_FOR_GRADIENTS = 128
_ROUND_OFF = 1e-5  # of float32 embeddings, relative to their size
_ON_SPHERE = ("normalized_covariance", "tangent_covariance")  # matrices of normalised embeddings


@torch.no_grad()
def describe_modes(
    run: str | Path,
    data: str | None = None,
    root: str | None = None,
    num_images: int = NUM_IMAGES,
    progress: Callable[..., Any] | None = None,
    accelerator: str = "auto",
    num_workers: int = 0,
) -> ModeDescription:
    """Return a description of each learned mode of a run.

    Modes belong to the matrix that the run's loss drives, computed from four random views of each image as in training.
    The record of the run gives their number; without a record, modes with more than a tenth of the largest eigenvalue
    count as learned. Batch normalisation uses its running statistics, as in ``stepwise embed``: variances on images
    unlike the training images may differ widely from the record, which is computed on whole batches.

    Args:
        run: folder of a run, ``runs/<name>/<version>``, or a checkpoint in it, see
            :func:`stepwise_lightning.load_encoder`. Its data must be a ``TwoViewDataModule``.
        data: images: a folder, ``photos``, ``cifar10`` or ``stl10``; None for the held-out images of the run.
        root: folder of ``cifar10`` and ``stl10``; None for the run's own setting, or ``data``.
        num_images: largest number of images, evenly spaced; at least 4.
        progress: wrapper of loops, called as ``progress(items, desc=…)``, for example ``tqdm``.
        accelerator: ``auto`` for a GPU if there is one, ``gpu`` or ``cpu``.
        num_workers: processes that read images and compute views.

    Raises:
        ValueError, FileNotFoundError: see :func:`stepwise_lightning.load_encoder` and
            :func:`stepwise_lightning.data.load_image_set`; fewer than four images; no learned mode; the accelerator
            is not available.

    """
    progress = progress or (lambda items, desc: items)
    checkpoint = checkpoint_of(run)
    encoder, settings = OnAccelerator(load_encoder(run), accelerator).eval(), input_settings(checkpoint)
    matrix, num_learned = _learned(checkpoint)
    readers, labels, class_names, paths = choose_images(checkpoint, data, root, num_images)
    inputs, views = embed_views(encoder, readers, settings, progress, num_workers)
    first, second = (part.flatten(0, 1) for part in views[ALL_TOGETHER].split(RANDOM_VIEWS // 2, dim=1))
    all_modes = Modes.of([first, second], matrix)
    embeddings = torch.cat([encoder(part) for part in inputs.split(64)])
    modes = _select(all_modes, num_learned, embeddings, run)
    coordinates = modes.coordinates(embeddings)
    scale = coordinates.std(0)
    ends = _ends(coordinates / scale)
    variances = all_modes.eigenvalues.clamp(min=0)
    return ModeDescription(
        run="/".join(checkpoint.absolute().parent.parent.parts[-2:]),
        data=data or "held-out images of the run",
        augmentation=settings["augmentation"],
        modes=modes,
        shares=variances[: len(modes)] / variances.sum(),
        all_coordinates=all_modes.coordinates(embeddings),
        labels=labels,
        class_names=class_names,
        paths=paths,
        invariance=_invariance(modes, views),
        gradients=_gradients(encoder, modes, inputs, settings),
        ends=ends,
        maps=_maps(encoder, modes, inputs, ends, scale, progress),
        **_relations(coordinates / scale, inputs, labels, settings),
    )


def _relations(coordinates: Tensor, inputs: Tensor, labels: Tensor, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a description that compare coordinates (n, k) with images and labels."""
    mean, std = (torch.tensor(settings[name])[:, None, None] for name in ("mean", "std"))
    images = (inputs * std + mean).clamp(0, 1)
    values = attributes.image_attributes(images)
    return {
        "images": images,
        "coordinates": coordinates,
        "class_share": attributes.class_share(coordinates, labels),
        "attributes": {name: attributes.correlations(coordinates, value) for name, value in values.items()},
        "explained": attributes.explained_share(coordinates, values),
    }


def _invariance(modes: Modes, views: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return shares of variance between images, (k,), from embeddings (n, views, d) by the varied parameter."""
    shares = {}
    for name, z in views.items():
        coordinates = modes.coordinates(z.flatten(0, 1)).unflatten(0, z.shape[:2])
        measure = variations.intraclass_correlation if name == ALL_TOGETHER else variations.invariance
        shares[name] = measure(coordinates)
    return shares


def _learned(checkpoint: Path) -> tuple[str, int | None]:
    """Return the matrix that a run's loss drives, and the number of learned modes in its record, None without one."""
    path, settings = class_and_arguments(configuration_of(checkpoint), "model")
    module, _, name = path.rpartition(".")
    try:
        model_class = getattr(importlib.import_module(module or "stepwise_lightning"), name, None)
    except ImportError:
        model_class = None
    driven = settings.get("driven_matrix") or getattr(model_class, "driven_matrix", None)
    file = checkpoint.parent.parent / "spectrum.npz"
    if not file.is_file():
        return driven or "covariance", None
    record = SpectrumRecord.load(file)
    recorded = [name for name in record.matrices if name in MATRICES]
    matrix = driven if driven in recorded else (recorded or [driven or "covariance"])[0]
    if matrix not in record.matrices or len(record) < 2:
        return matrix, None
    values = record.eigenvalues(matrix)
    if torch.allclose(values[0], values[-1], rtol=0.1, atol=0, equal_nan=True):
        raise UserError(
            f"no learned modes in {str(file.parent)!r}: no eigenvalue of its {matrix} has changed by a tenth since the "
            "start; train it longer"
        )
    return matrix, int(record.detect_steps(matrix).num_learned[-1])


def _select(modes: Modes, count: int | None, embeddings: Tensor, run: str | Path) -> Modes:
    """Return the learned modes, along which the images must differ by more than round-off."""
    size = 1.0 if modes.matrix in _ON_SPHERE else float(embeddings.double().square().sum(1).mean().sqrt())
    is_real = (modes.eigenvalues > 0) & (modes.coordinates(embeddings).std(0) > _ROUND_OFF * size)
    if count is None and len(modes):
        count = int((modes.eigenvalues > 0.1 * modes.eigenvalues[0]).sum())
    count = int(is_real[: count or 0].long().cumprod(0).sum())
    if not count:
        raise UserError(
            f"no learned modes in {str(run)!r}: the images have (nearly) equal embeddings; train it longer, or give "
            "other images with --data"
        )
    return Modes(modes.matrix, modes.eigenvalues[:count], modes.directions[:, :count], modes.origin, modes.axis)


def _ends(coordinates: Tensor) -> Tensor:
    """Return images of the lowest tenth, around the median, and of the highest tenth, ascending, (k, 3, m).

    They are evenly spaced in each tenth, because neighbours in rank are often nearly identical.
    """
    n = len(coordinates)
    tenth = max(n // 10, min(_NUM_SHOWN, n // 3), 1)
    ranks = torch.linspace(0, tenth - 1, min(_NUM_SHOWN, tenth)).round().long()
    order = coordinates.argsort(0)
    return torch.stack([order[start + ranks] for start in (0, (n - tenth) // 2, n - tenth)]).permute(2, 0, 1)


def _gradients(encoder: nn.Module, modes: Modes, inputs: Tensor, settings: dict[str, Any]) -> Tensor:
    """Return mean gradients with respect to pixel values before normalisation."""
    std = torch.tensor(settings["std"], dtype=torch.float64)[:, None, None]
    return mean_gradients(encoder, modes, inputs[:_NUM_FOR_GRADIENTS]) / std


def _maps(
    encoder: nn.Module, modes: Modes, inputs: Tensor, ends: Tensor, scale: Tensor, progress: Callable[..., Any]
) -> dict[tuple[int, int], Tensor]:
    """Return the occlusion maps of some images at the ends of each mode, by (mode, image)."""
    shown = [
        (mode, image)
        for mode, (low, _, high) in enumerate(ends.tolist())
        for image in [*low[:_NUM_MAPS], *high[-_NUM_MAPS:]]
    ]
    images = sorted({image for _, image in shown})
    wrap = partial(progress, desc="covering parts")
    maps = occlusion_maps(encoder, modes, inputs[images], wrap) / scale[:, None, None]
    return {(mode, image): maps[images.index(image), mode] for mode, image in shown}
