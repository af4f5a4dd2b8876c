"""Images of any data set or stream, and the dotted path of a function that returns one."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import islice
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, IterableDataset, Subset

from stepwise_lightning.data.folders import split_name
from stepwise_lightning.data.image_files import NUM_FOR_STATISTICS, level_statistics, picture_levels, rgb_image
from stepwise_lightning.data.image_sets import DATA_SETS, ImageSet, load_image_set
from stepwise_lightning.errors import UserError
from stepwise_lightning.seeding import isolated_rng

if TYPE_CHECKING:  # importing this package needs only torch and lightning
    from PIL import Image

_DOTTED_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
_KEYS = ("image", "img")


class OwnImages(ImageSet):
    """Images of a map-style data set.

    A sample is an image, see :func:`stepwise_lightning.data.image_files.rgb_image`, a tuple (image, label), or a
    dictionary with ``image`` or ``img`` and possibly ``label``.

    Args:
        images: has ``__len__`` and ``__getitem__``.

    Attributes:
        labels: int64, (N,), −1 for unknown: the attribute ``targets`` or ``labels`` of the data set, as in torchvision,
            or its column ``label``; otherwise the labels of the samples, which are then all read.
        class_names: its attribute ``classes``, or numbers.

    """

    images: Any

    def __init__(self, images: Any) -> None:
        names: Any = next((part.classes for part in _parts(images) if hasattr(part, "classes")), None)
        if names is None and (labels := _known_labels(images)) is not None:
            names = range(int(labels.max()) + 1)
        self.__dict__.update(images=images, class_names=list(map(str, names or ())))

    @cached_property
    def labels(self) -> Tensor:
        """Return the labels."""
        known = _known_labels(self.images)
        return torch.tensor([self._sample(index)[1] for index in range(len(self))]) if known is None else known

    def __len__(self) -> int:
        return len(self.images)

    def sample(self, index: int, seed: int = 0, min_side: int = 0) -> tuple[Image.Image, int]:
        """Return one image as RGB and its label; ``seed`` seeds torch's global generator."""
        image, label = self._sample(index, seed)
        return rgb_image(image, min_side), label

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Return the channel statistics of 1000 evenly spaced images."""
        indices = range(0, len(self), -(-len(self) // NUM_FOR_STATISTICS))
        return level_statistics(picture_levels(map(self.picture, indices)))

    def _sample(self, index: int, seed: int = 0) -> tuple[Any, int]:
        with isolated_rng(seed):
            sample = self.images[index]
        label = None
        if isinstance(sample, Mapping):
            key = next((key for key in _KEYS if key in sample), None)
            if key is None:
                raise UserError(f"a sample has the keys {', '.join(map(repr, sample))}: expected 'image' or 'img'")
            sample, label = sample[key], sample.get("label")
        elif isinstance(sample, tuple | list):
            sample, label = (*sample, None)[:2]
        label = label.item() if isinstance(label, Tensor) and label.numel() == 1 else label
        return sample, int(label) if isinstance(label, Integral) else -1


class ImageStream(ImageSet):
    """Training images of an iterable of (image, id) or (image, id, label), which restarts at each pass.

    If it has a method ``set_epoch``, each pass calls it first.
    """

    images: Any

    def __init__(self, images: Any) -> None:
        super().__init__(images, torch.empty(0), [])

    def one_pass(self, epoch: int) -> Iterator[tuple[Any, int | str, int]]:
        """Yield image, id and label, −1 for unknown, of each sample."""
        if callable(set_epoch := getattr(self.images, "set_epoch", None)):
            set_epoch(epoch)
        for sample in self.images:
            is_valid = (
                isinstance(sample, tuple | list) and len(sample) in (2, 3) and isinstance(sample[1], Integral | str)
            )
            if not is_valid:
                raise UserError(
                    f"the stream yields {type(sample).__name__} objects that are not (image, id) or (image, id, label) "
                    "with an integer or a string as id"
                )
            yield (*sample, -1)[:3]

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Return the channel statistics of the first 1000 images."""
        samples = islice(self.one_pass(0), NUM_FOR_STATISTICS)
        return level_statistics(picture_levels(rgb_image(image) for image, *_ in samples))


def imported_data(data: Any) -> Any:
    """Return the result of a function if ``data`` is its dotted path, otherwise ``data``."""
    is_name = isinstance(data, str) and data not in DATA_SETS and not Path(data).exists()
    if not is_name or not _DOTTED_PATH.fullmatch(data):
        return data
    module, _, name = data.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name)
    except (AttributeError, ImportError) as error:
        raise UserError(f"data {data!r} is no folder and cannot be imported: {error}") from error
    return function()


def any_image_set(data: Any, split: str = "train", root: str = "data", verify: bool = True) -> ImageSet:
    """Return one split of images of any kind.

    ``data`` is as in :func:`load_image_set`, which documents the other arguments; a map-style data set, of which every
    tenth sample is held out; or a dictionary of data sets by split, in which ``train`` may be a stream.
    """
    if isinstance(data, str):
        return load_image_set(data, split, root, verify=verify)
    if isinstance(data, Mapping):
        return _split_of(data, split)
    if not _is_map_style(data):
        raise UserError(
            f"data of type {type(data).__name__} have no length and random access: give a data set of images, or "
            "{'train': iterable of (image, id), 'val': data set}"
        )
    if len(data) < 10:
        raise UserError(f"too few images to hold some out: {len(data)}, at least 10 are needed")
    chosen = [index for index in range(len(data)) if (index % 10 == 9) == (split != "train")]
    return _own_set(data[chosen] if isinstance(data, Tensor) else Subset(data, chosen))


def _split_of(data: Mapping[str, Any], split: str) -> ImageSet:
    splits = {split_name(str(name)): part for name, part in data.items()}
    if len(splits) < len(data) or not {"train"} < set(splits) <= {"train", "val", "test"}:
        raise UserError(f"data have the keys {', '.join(map(repr, data))}: expected 'train' and 'val' or 'test'")
    held_out = splits.get("val", splits.get("test"))
    part = ({"val": held_out, "test": held_out} | splits)[split]
    if _is_map_style(part):
        return _own_set(part)
    if split != "train" or not isinstance(part, Iterable) or isinstance(part, Iterator):
        kind, others = type(part).__name__, "or an iterable of (image, id) that can be read again"
        others = others if split == "train" else "such as a list"
        raise UserError(f"{split} data of type {kind}: give a data set with a length and random access, {others}")
    return ImageStream(part)


def _own_set(data: Any) -> ImageSet:
    if not len(data):
        raise UserError("the data set is empty")
    if isinstance(data, Tensor) and data.dtype == torch.uint8 and data.ndim == 4 and data.shape[1] == 3:
        return ImageSet(data, torch.full((len(data),), -1), [])
    return OwnImages(list(data) if isinstance(data, Tensor) else data)


def _is_map_style(data: Any) -> bool:
    return hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, IterableDataset)


def _parts(data: Any) -> Iterator[Any]:
    """Yield a data set and the data sets that it is made of."""
    yield data
    for part in [data.dataset] if isinstance(data, Subset) else getattr(data, "datasets", ()):
        yield from _parts(part)


def _known_labels(data: Any) -> Tensor | None:
    """Return the labels that a data set lists separately from its images, or None."""
    if isinstance(data, Subset):
        labels = _known_labels(data.dataset)
        return None if labels is None else labels[list(data.indices)]
    if isinstance(data, ConcatDataset):
        parts = [labels for part in data.datasets if (labels := _known_labels(part)) is not None]
        return torch.cat(parts) if len(parts) == len(data.datasets) else None
    labels = getattr(data, "targets", getattr(data, "labels", None))
    if "label" in (getattr(data, "column_names", None) or ()):
        labels = data["label"]
    return None if labels is None or len(labels) != len(data) else torch.as_tensor(labels).long()
