"""Portraits of a run's learned modes: the images at their ends, and what each mode sees and what it is blind to."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepwise_lightning.data.augmentation import AugmentationParameters
from stepwise_lightning.errors import UserError
from stepwise_lightning.modes import attributes, variations
from stepwise_lightning.modes.directions import Modes
from stepwise_lightning.modes.images import (
    ALL_TOGETHER,
    LEAST_IMAGES,
    RANDOM_VIEWS,
    chosen_pictures,
    embedded_views,
)
from stepwise_lightning.modes.sensitivity import mean_gradients, occlusion_maps
from stepwise_lightning.runs.saved import checkpoint_of, configuration_of
from stepwise_lightning.spectrum.matrices import MATRICES
from stepwise_lightning.spectrum.record import SpectrumRecord
from stepwise_lightning.trained import input_settings, load_encoder

__all__ = ["ModePortraits", "describe_modes"]

NUM_IMAGES = 256
_SHOWN = 6  # images at each end of a mode and in its middle
_COVERED = 3  # of those at an end, how many get an occlusion map
_GRADIENT_IMAGES = 128
_ROUND_OFF = 1e-5  # of the size of embeddings, which are float32


@dataclass(frozen=True)
class ModePortraits:
    """What :func:`describe_modes` says of k learned modes on n images; a notebook shows it as the page.

    Attributes:
        run, data: what was looked at, in words.
        augmentation: of the run: ``standard`` or ``weak``.
        modes: the learned ones, of views drawn as in training.
        shares: of the variance that all modes have, (k,).
        images: as the network sees them, centre crops, (n, 3, size, size) in [0, 1].
        coordinates: of these, (n, k), each mode divided by its standard deviation over the images.
        all_coordinates: of these along all modes, learned or not, (n, ≤ d), as they are.
        labels: int64, (n,), −1 where unknown.
        class_names: what the labels stand for.
        paths: of each image, or set/split/number.
        class_share: variance between classes, ε², (k,); None without two known classes.
        attributes: Pearson's r with each of ``attributes.ATTRIBUTES``, by name, (k,); NaN where it is constant.
        explained: share of variance that all of these explain together, left-out, (k,).
        unchanged: share of variance that is between images when views differ in one parameter alone, by its name, and
            in all as in training, ``all together``, (k,): 1 where the mode is blind to it.
        gradients: mean gradients with respect to pixel values, (k, 3, size, size).
        ends: images of the lowest tenth, around the median and of the highest tenth, (k, 3, m), their numbers.
        maps: occlusion maps by (mode, image), (size, size) each, in units of the mode's standard deviation.

    """

    run: str
    data: str
    augmentation: str
    modes: Modes
    shares: Tensor
    images: Tensor
    coordinates: Tensor
    all_coordinates: Tensor
    labels: Tensor
    class_names: list[str]
    paths: list[str]
    class_share: Tensor | None
    attributes: dict[str, Tensor]
    explained: Tensor
    unchanged: dict[str, Tensor]
    gradients: Tensor
    ends: Tensor
    maps: dict[tuple[int, int], Tensor]

    def html(self) -> str:
        """Return a page of its own, which needs no other file."""
        from stepwise_lightning.modes.page import page

        return page(self)

    def _repr_html_(self) -> str:
        return f'<iframe srcdoc="{escape(self.html())}" style="width: 100%; height: 80vh; border: 0"></iframe>'


def describe_modes(
    run: str | Path,
    data: str | None = None,
    root: str | None = None,
    num_images: int = NUM_IMAGES,
    progress: Callable[..., Any] | None = None,
) -> ModePortraits:
    """Return what each learned mode of a run looks like, what it varies with, and what it is blind to.

    Modes are those of the matrix that the run's loss drives, of four views of each image, drawn as in training; as many
    as the record of the run says are learned, or as have more than a tenth of the largest eigenvalue where there is no
    record. Batch normalisation uses its running statistics, as in ``stepwise embed``, so that variances on images of
    another kind than the training ones may be far from those in the record, which are of whole batches.

    Args:
        run: the folder of a run, ``runs/<name>/<version>``, or a checkpoint in it; see
            :func:`stepwise_lightning.load_encoder`. Its data must be a ``TwoViewDataModule``.
        data: images to look at: a folder, ``photos``, ``cifar10`` or ``stl10``; None for the run's held-out ones.
        root: where ``cifar10`` and ``stl10`` lie; None for where they lay for the run, or ``data``.
        num_images: how many at the most, evenly spaced; at least 4.
        progress: put around the work as ``progress(items, desc=…)``, for instance ``tqdm``.

    Raises:
        ValueError, FileNotFoundError: see :func:`stepwise_lightning.load_encoder` and
            :func:`stepwise_lightning.data.load_image_set`; fewer than four images; no learned mode.

    """
    if num_images < LEAST_IMAGES:
        raise UserError(f"num_images must be at least {LEAST_IMAGES}, got {num_images}")
    around: Callable[..., Any] = progress or (lambda items, desc: items)
    checkpoint = checkpoint_of(run)
    encoder, settings = load_encoder(run), input_settings(checkpoint)
    matrix, count = _learned(checkpoint)
    pictures, labels, names, paths = chosen_pictures(checkpoint, data, root, num_images)
    strengths = AugmentationParameters.of(settings["augmentation"])
    inputs, random, varied = embedded_views(encoder, pictures, settings, strengths, around)
    first, second = random[:, : RANDOM_VIEWS // 2].flatten(0, 1), random[:, RANDOM_VIEWS // 2 :].flatten(0, 1)
    everything = Modes.of([first, second], matrix)
    with torch.no_grad():
        plain = torch.cat([encoder(part) for part in inputs.split(64)])
    modes = _kept(everything, count, plain, run)
    scale = modes.coordinates(plain).std(0)
    coordinates = modes.coordinates(plain) / scale
    described = attributes.image_attributes(_shown(inputs, settings))
    ends = _ends(coordinates)
    positive = everything.eigenvalues.clamp(min=0)
    deviation = torch.tensor(settings["std"], dtype=torch.float64)[:, None, None]
    return ModePortraits(
        run="/".join(checkpoint.absolute().parent.parent.parts[-2:]),
        data=data or "held-out images of the run",
        augmentation=settings["augmentation"],
        modes=modes,
        shares=positive[: len(modes)] / positive.sum(),
        images=_shown(inputs, settings),
        coordinates=coordinates,
        all_coordinates=everything.coordinates(plain),
        labels=labels,
        class_names=names,
        paths=paths,
        class_share=attributes.class_share(coordinates, labels),
        attributes={name: attributes.correlations(coordinates, values) for name, values in described.items()},
        explained=attributes.explained_share(coordinates, described),
        unchanged=_unchanged(modes, {ALL_TOGETHER: random} | varied),
        gradients=mean_gradients(encoder, modes, inputs[:_GRADIENT_IMAGES]) / deviation,
        ends=ends,
        maps=_maps(encoder, modes, inputs, ends, scale, around),
    )


def _unchanged(modes: Modes, views: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the shares of variance between images, (k,), from embeddings (n, views, d) by what these differ in."""
    coordinates = {name: modes.coordinates(z.flatten(0, 1)).unflatten(0, z.shape[:2]) for name, z in views.items()}
    return {
        name: (variations.shared_by_views if name == ALL_TOGETHER else variations.unchanged_share)(values)
        for name, values in coordinates.items()
    }


def _learned(checkpoint: Path) -> tuple[str, int | None]:
    """Return the matrix that a run's loss drives, and how many modes its record says are learned; None without one.

    Raises:
        UserError: nothing has been learned yet.

    """
    model = configuration_of(checkpoint).get("model") or {}
    place, _, name = str(model.get("class_path", "")).rpartition(".")
    try:
        driven = getattr(
            getattr(importlib.import_module(place or "stepwise_lightning"), name, None), "driven_matrix", None
        )
    except ImportError:
        driven = None
    file = checkpoint.parent.parent / "spectrum.npz"
    if not file.is_file():
        return driven or "covariance", None
    record = SpectrumRecord.load(file)
    own = [name for name in record.matrices if name in MATRICES]
    matrix = driven if driven in own else (own or [driven or "covariance"])[0]
    if matrix not in record.matrices or len(record) < 2:
        return matrix, None
    values = record.eigenvalues(matrix)
    start, end = values[0], values[-1]
    if torch.allclose(start, end, rtol=0.1, atol=0, equal_nan=True):
        raise UserError(
            f"no learned modes in {str(file.parent)!r}: no eigenvalue of its {matrix} has changed by a tenth since the "
            "start; train it longer"
        )
    return matrix, int(record.detect_steps(matrix).num_learned[-1])


def _kept(modes: Modes, count: int | None, plain: Tensor, run: str | Path) -> Modes:
    """Return the learned ones, in which images must differ by more than round-off."""
    on_sphere = modes.matrix in ("normalized_covariance", "tangent_covariance")
    size = 1.0 if on_sphere else float(plain.double().square().sum(1).mean().sqrt())
    real = (modes.eigenvalues > 0) & (modes.coordinates(plain).std(0) > _ROUND_OFF * size)
    if count is None and len(modes):
        count = int((modes.eigenvalues > 0.1 * modes.eigenvalues[0]).sum())
    count = int(real[: count or 0].long().cumprod(0).sum())
    if not count:
        raise UserError(
            f"no learned modes in {str(run)!r}: all of these images have one embedding, or nearly so; train it longer, "
            "or give other images with --data"
        )
    return Modes(modes.matrix, modes.eigenvalues[:count], modes.directions[:, :count], modes.origin, modes.axis)


def _shown(inputs: Tensor, settings: dict[str, Any]) -> Tensor:
    mean, std = (torch.tensor(settings[name])[:, None, None] for name in ("mean", "std"))
    return (inputs * std + mean).clamp(0, 1)


def _ends(coordinates: Tensor) -> Tensor:
    """Return images of the lowest tenth, around the median, and of the highest tenth, ascending, (k, 3, m).

    Evenly spaced within each tenth: neighbours in rank are often nearly the same image.
    """
    n = len(coordinates)
    tenth = max(n // 10, min(_SHOWN, n // 3), 1)
    ranks = torch.linspace(0, tenth - 1, min(_SHOWN, tenth)).round().long()
    order = coordinates.argsort(0)
    return torch.stack([order[start + ranks] for start in (0, (n - tenth) // 2, n - tenth)]).permute(2, 0, 1)


def _maps(
    encoder: nn.Module, modes: Modes, inputs: Tensor, ends: Tensor, scale: Tensor, around: Callable[..., Any]
) -> dict[tuple[int, int], Tensor]:
    wanted = [
        (mode, image)
        for mode, (low, _, high) in enumerate(ends.tolist())
        for image in [*low[:_COVERED], *high[-_COVERED:]]
    ]
    images = sorted({image for _, image in wanted})

    def progress(places: Iterable[Any]) -> Any:
        return around(places, desc="covering parts")

    maps = occlusion_maps(encoder, modes, inputs[images], progress) / scale[:, None, None]
    return {(mode, image): maps[images.index(image), mode] for mode, image in wanted}
