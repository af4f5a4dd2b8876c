"""Read images, of files and of any data set, as 8-bit RGB, and compute their channel statistics.

A file that cannot be read raises an error. Skipping it would change the split, the order and the channel statistics:
two machines with the same folder could train on different images.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from stepwise_lightning.data.stl10 import JoinedImages
from stepwise_lightning.errors import UserError

if TYPE_CHECKING:  # importing this package needs only torch and lightning
    import numpy as np
    from PIL import Image

NUM_FOR_STATISTICS = 1000  # images read for the statistics of a set that is not held in memory
_NUM_NAMED = 3  # unreadable files named in one error
# Documents, videos and tables, and formats that Pillow reads only with an external program.
_OTHER_FORMATS = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF"}
_SCALED_BY_PILLOW = ("PPM", "JPEG2000")  # formats whose header states the range of values
_TIFF_BITS, _TIFF_PLANES = 258, 284


def read_image(path: str | Path, maxima: list[int] | None = None, min_side: int = 0) -> Image.Image:
    """Return an image file as RGB, 8 bits per channel.

    Grayscale images get three equal channels. An alpha channel is dropped, as in torchvision, and reveals the colour
    stored under transparent pixels. 16-bit images keep the upper 8 bits. Only the first frame is read, and EXIF
    orientation is ignored. Pillow warns above 89 million pixels.

    Args:
        path: of the file.
        maxima: list to which the largest value (after conversion to 8 bits) of a 16-bit image is appended.
        min_side: an image whose shorter side is at least twice as long is reduced by a whole number, to a shorter side
            of at least ``min_side`` pixels. 0 for the full size.

    Raises:
        ValueError: the file is not an image, is damaged, has more than 179 million pixels, or holds floating-point
            values or integers beyond 16 bits, whose range is unknown.

    """
    try:
        with open(path, "rb") as file:
            return _decode(file, maxima, min_side)
    except Exception as error:  # Pillow's decoders raise arbitrary exceptions on damaged files
        raise UserError(f"{str(path)!r} cannot be read as an image ({_reason(error)}): remove or repair it") from error


def rgb_image(image: Any, min_side: int = 0) -> Image.Image:
    """Return an image of any kind as RGB, 8 bits per channel; see :func:`read_image` for the conversion.

    It is a PIL image; a uint8 or uint16 tensor (c, h, w) or NumPy array (h, w, c) with 1 to 4 channels or without that
    axis; the path of a file; or the content of a file as ``bytes``.
    """
    import numpy as np
    from PIL import Image

    if isinstance(image, str | Path):
        return read_image(image, min_side=min_side)
    try:
        if isinstance(image, bytes):
            return _decode(BytesIO(image), None, min_side)
        if isinstance(image, Tensor | np.ndarray):
            image = Image.fromarray(_eight_bit_array(image))
        if isinstance(image, Image.Image):
            return _to_rgb(image, None)
    except Exception as error:
        raise UserError(f"an image of the data cannot be used: {_reason(error)}") from error
    raise UserError(
        f"an image of the data has the type {type(image).__name__}: expected a PIL image, a uint8 tensor, a NumPy "
        "array, a path, or the bytes of a file"
    )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _decode(file: BinaryIO, maxima: list[int] | None, min_side: int) -> Image.Image:
    from PIL import Image

    with Image.open(file, formats=image_formats()[1]) as image:
        if min_side:
            image.draft(
                image.mode, (min_side, min_side)
            )  # decodes a JPEG at a half, a quarter or an eighth of its size
        rgb = _to_rgb(image, maxima)
    factor = min(rgb.size) // min_side if min_side else 1
    return rgb.reduce(factor) if factor > 1 else rgb


def _eight_bit_array(image: Tensor | np.ndarray) -> np.ndarray:
    """Return an image as uint8 (h, w) or (h, w, 3 or 4)."""
    import numpy as np

    array = (
        np.moveaxis(image.cpu().numpy(), 0, -1) if isinstance(image, Tensor) and image.ndim == 3 else np.asarray(image)
    )
    shape = array.shape
    if array.ndim == 3 and array.shape[2] <= 2:
        array = array[..., 0]  # without alpha
    if array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise UserError(
            f"values of type {array.dtype} and shape {shape}, expected uint8 or uint16, (3, h, w) in a tensor and "
            "(h, w, 3) in a NumPy array; remove transforms to floats, such as ToTensor"
        )
    return np.ascontiguousarray(array)


def read_images(paths: list[str], maxima: list[int] | None = None) -> Iterator[Tensor]:
    """Yield each image as uint8 (3, h, w), with a progress bar; ``maxima`` as in :func:`read_image`.

    Unreadable files are counted, and raise one ValueError at the end.
    """
    from tqdm import tqdm

    errors = []
    for path in tqdm(paths, desc="reading images", leave=False, delay=1, disable=None):  # None: only on a terminal
        try:
            image = pixels(read_image(path, maxima))
        except ValueError as error:
            errors.append(str(error))
        else:
            if not errors:  # after an error, the remaining files are read only to count further errors
                yield image
    if len(errors) == 1:
        raise UserError(errors[0])
    if errors:
        others = f"; and {len(errors) - _NUM_NAMED} more" if len(errors) > _NUM_NAMED else ""
        raise UserError(
            f"{len(errors)} of {len(paths)} image files cannot be read: {'; '.join(errors[:_NUM_NAMED])}{others}"
        )


def pixels(image: Image.Image) -> Tensor:
    """Return an RGB image as uint8 (3, h, w)."""
    from torchvision.transforms.v2.functional import pil_to_tensor

    return pil_to_tensor(image)


def warn_of_unused_bits(maxima: list[int], folder: str) -> None:
    """Warn if no 16-bit image uses the upper half of the range; ``maxima`` as in :func:`read_image`."""
    if maxima and max(maxima) < 128:
        bits = 8 + max(maxima).bit_length()
        rank_zero_warn(
            f"the 16-bit images in {folder!r} use at most {bits} bits, and only the upper 8 of 16 bits are kept "
            f"({max(maxima) + 1} of 256 levels): multiply their values by {2 ** (16 - bits)}"
        )


@lru_cache(maxsize=1)
def image_formats() -> tuple[frozenset[str], tuple[str, ...]]:
    """Return the file endings and the format names that the installed Pillow reads without an external program."""
    from PIL import Image

    registered = Image.registered_extensions()  # loads all plug-ins, which fills Image.OPEN
    formats = tuple(name for name in Image.ID if name in Image.OPEN and name not in _OTHER_FORMATS)
    known = {*formats, "MPO"}  # Pillow opens MPO as JPEG
    endings = {ending for ending, name in registered.items() if name in known}
    return frozenset(endings - {".pfm"}), formats  # .pfm holds floating-point values


def _to_rgb(image: Image.Image, maxima: list[int] | None) -> Image.Image:
    if 0 in image.size:
        raise UserError(f"{image.width}×{image.height} pixels, at least 1×1 are needed")
    tags = getattr(image, "tag_v2", {})
    if tags.get(_TIFF_PLANES) == 2 and max(tags.get(_TIFF_BITS, (8,))) > 8:
        raise UserError("16-bit colours in separate planes, which Pillow decodes wrongly: save them interleaved")
    raw_modes = " ".join(str(tile) for tile in getattr(image, "tile", []))
    is_deep_gray = image.mode == "F" or image.mode.startswith("I")
    is_deep = is_deep_gray or re.search(r"(RGB[AX]?|LA|CMYK);16[BLN]", raw_modes) is not None
    is_scaled = image.format in _SCALED_BY_PILLOW
    if is_deep_gray:
        image = _upper_eight_bits(image)
    elif image.mode == "P":
        image = image.convert("RGBA")  # Pillow warns if a palette with transparency becomes RGB directly
    rgb = image.convert("RGB")
    if is_deep and not is_scaled and maxima is not None:
        maxima.append(max(int(high) for _, high in rgb.getextrema()))  # type: ignore[misc]  # one pair per channel
    return rgb


def _upper_eight_bits(image: Image.Image) -> Image.Image:
    """Return a grayscale image of 16 bits as 8 bits; Pillow itself would clip it at 255."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise UserError(
            f"pixels of mode {image.mode} between {values.min()} and {values.max()} have no known range: expected 8 or "
            "16 bits"
        )
    return Image.fromarray((values.astype(np.uint16) >> 8).astype(np.uint8))


def channel_statistics(images: Tensor | JoinedImages) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel of uint8 images (N, 3, h, w) in [0, 1].

    They are float64, (3,) each, on the CPU.
    """
    return level_statistics(_histogram(images))


def _histogram(images: Tensor | JoinedImages) -> Tensor:
    # In chunks, because bincount converts to int64 and STL-10 has 2.9 GB.
    chunks = (chunk.transpose(0, 1).flatten(1) for chunk in images.split(4096))
    counts = (torch.stack([c.bincount(minlength=256) for c in chunk]).cpu() for chunk in chunks)
    return sum(counts, torch.zeros(3, 256, dtype=torch.int64, device="cpu"))


def picture_levels(pictures: Iterable[Image.Image]) -> Tensor:
    """Return how often RGB images of any sizes have each level, (3, 256)."""
    return sum((_histogram(pixels(picture)[None]) for picture in pictures), torch.zeros(3, 256, device="cpu"))


def level_statistics(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return :func:`channel_statistics` for the number of pixels at each level, (3, 256)."""
    levels = torch.arange(256, dtype=torch.float64, device="cpu") / 255
    share = counts.double() / counts.sum(1, keepdim=True)
    mean = share @ levels
    std = (share @ levels.square() - mean.square()).clamp(min=0).sqrt()
    if (std < 1e-6).any():
        raise UserError(
            "a colour channel is constant over the whole data set and cannot be normalised: use other images"
        )
    return mean, std
