"""Image files: which ones a folder holds, and what each is turned into. Nothing is skipped silently.

A file that cannot be read is refused, not skipped: without it the held-out tenth, the order and the statistics would be
those of another data set, and two machines with one folder would train on different images.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from stepwise_lightning.errors import CannotReadError, UserError

if TYPE_CHECKING:  # importing this package needs only torch and lightning
    from PIL import Image

_NAMED = 3  # of the files that cannot be read


def image_paths(folder: Path) -> list[Path]:
    """Return the image files below ``folder`` at any depth, sorted by path.

    Symbolic links are followed, as torchvision does, but each folder is read once, however many links lead to it, and
    under its own name rather than a link's: loops end, and no image is in two splits because a link repeats it. A link
    to an image that is gone is returned, and refused when it is read.

    Raises:
        ValueError: there are none.
        CannotReadError: a folder may not be read (an OSError too).

    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    paths = sorted(path for path in _files(folder) if path.suffix.lower() in IMG_EXTENSIONS)
    if not paths:
        raise UserError(f"no images in {str(folder)!r}: expected files ending in {', '.join(IMG_EXTENSIONS)}")
    return paths


def read_image(path: Path) -> Image.Image:
    """Return an image file as RGB, 8 bits per channel.

    Grey images get three equal channels; an alpha channel is dropped, as torchvision does (transparent pixels show the
    colour stored under them); of 16-bit images the upper 8 bits are kept, colour or grey; of several frames the first
    is taken; EXIF orientation is ignored. Pillow warns of more than 89 million pixels.

    Raises:
        ValueError: the file cannot be read, is not an image or broken, has more than 179 million pixels, or pixels
            without a known range (32-bit integers beyond 16 bits, floating point).

    """
    from PIL import Image

    try:
        with path.open("rb") as file, Image.open(file) as image:
            if image.mode == "F" or image.mode.startswith("I"):
                return _from_deep_grey(image)
            # Pillow would warn that a palette may hold transparency in several ways.
            return (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")
    except Exception as error:  # on damaged files Pillow raises whatever its decoders come across
        raise UserError(f"{str(path)!r} cannot be read as an image ({_reason(error)}): remove or repair it") from error


def pixels(image: Image.Image) -> Tensor:
    """Return an RGB image as uint8 (3, h, w)."""
    from torchvision.transforms.v2.functional import pil_to_tensor

    return pil_to_tensor(image)


def read_all(paths: list[Path]) -> Iterator[Tensor]:
    """Yield the pixels of each image, uint8 (3, h, w), behind a progress bar.

    Raises:
        ValueError: at the end, some could not be read; it counts them and names the first ones.

    """
    refusals = []
    for path in _progress(paths):
        try:
            image = pixels(read_image(path))
        except ValueError as error:
            refusals.append(str(error))
        else:
            if not refusals:  # otherwise the rest is read to be counted
                yield image
    if len(refusals) == 1:
        raise UserError(refusals[0])
    if refusals:
        others = f"; and {len(refusals) - _NAMED} more" if len(refusals) > _NAMED else ""
        raise UserError(
            f"{len(refusals)} of {len(paths)} image files cannot be read: {'; '.join(refusals[:_NAMED])}{others}"
        )


def _files(folder: Path) -> Iterator[Path]:
    seen: set[tuple[int, int]] = set()
    waiting = deque([str(folder)])
    while waiting:
        where = waiting.pop()
        try:
            status, names = os.stat(where), sorted(os.listdir(where))
        except OSError as error:
            raise CannotReadError(f"the folder {where!r} cannot be read: {error.strerror}") from error
        if (identity := (status.st_dev, status.st_ino)) in seen:
            continue
        seen.add(identity)
        for name in names:
            path = os.path.join(where, name)
            if os.path.isdir(path):
                # Links wait until every folder has been read under its own name.
                (waiting.appendleft if os.path.islink(path) else waiting.append)(path)
            elif os.path.isfile(path) or not os.path.exists(path):  # no pipes, which would wait for ever
                yield Path(path)


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """Return the upper 8 of 16 bits: Pillow's own conversion would clip at 255."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise UserError(f"pixels of mode {image.mode}, {values.min()} to {values.max()}, have no known range: 8 or 16 "
                         "bits are expected")  # fmt: skip
    return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _progress(paths: list[Path]) -> Iterable[Path]:
    from tqdm import tqdm

    return tqdm(paths, desc="reading images", leave=False, delay=1)
