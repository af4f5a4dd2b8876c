"""Images of 9 to 16 bits per channel: which 8 of them are kept.

Microscopes, X-ray detectors and depth cameras store 10, 12 or 14 bits in 16. Where the file says how many, the upper 8
of these are kept; where it says nothing, the upper 8 of 16, since scaling each image by its own maximum would change
the data. If these are mostly empty over all images, one line warns of it.

A file says it by PNG's ``sBIT``, TIFF's ``BitsPerSample`` (12), or TIFF's ``MaxSampleValue`` or ``SMaxSampleValue`` if
that is 2^b − 1 of 8 to 16 bits: any other number is the largest value of this one image, not the range of all. Netpbm
and JPEG 2000 say it always, and Pillow spreads their values over 16 bits itself.
"""

from __future__ import annotations

import re
import struct
import sys
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn

from stepwise_lightning.errors import UserError

if TYPE_CHECKING:  # importing this package needs only torch and lightning
    import numpy as np
    from PIL import Image

_TIFF_BITS, _TIFF_PLANES, _TIFF_MAXIMA = 258, 284, (281, 341)
_SPREAD_BY_PILLOW = ("PPM", "JPEG2000")


@dataclass
class Depths:
    """The largest value over all images of 16 bits whose files do not say how many bits they use.

    Attributes:
        count: number of such images read so far.
        maximum: over all of them.

    """

    count: int = 0
    maximum: int = 0

    def note(self, maximum: int) -> None:
        """Take one image into account."""
        self.count += 1
        self.maximum = max(self.maximum, maximum)

    def warn(self, folder: str) -> None:
        """Warn in one line if the upper half of 16 bits, or more, is used by no image."""
        if self.count and self.maximum < 2**15:
            bits = max(1, self.maximum.bit_length())
            levels = (self.maximum >> 8) + 1
            rank_zero_warn(
                f"16 bits per channel in {folder!r}: the largest value read ({self.count} of these images) is "
                f"{self.maximum}, as of {bits} bits, and the files do not say how many they use: the upper 8 of 16 "
                f"are kept, at most {levels} of 256 levels; multiply the values by {2 ** (16 - bits)}"
            )


def upper_eight_bits(image: Image.Image, file: IO[bytes], depths: Depths | None = None) -> Image.Image | None:
    """Return an image of 9 to 16 bits as RGB of 8 bits; None if it has no more than 8.

    Pillow itself would clip grey at 255, and keep the upper 8 of 16 bits of colours.

    Args:
        image: as opened by Pillow, not loaded yet.
        file: that it was opened from.
        depths: takes note of the image if its file does not say how many bits it uses.

    Raises:
        ValueError: pixels without a known range: integers beyond 16 bits, floating point, or beyond what the file says;
            a TIFF file with a plane of 16 bits for each colour.

    """
    import numpy as np
    from PIL import Image

    said = image.format in _SPREAD_BY_PILLOW
    tags = getattr(image, "tag_v2", {})
    if tags.get(_TIFF_PLANES) == 2 and max(tags.get(_TIFF_BITS, (8,))) > 8:
        raise UserError("colours of 16 bits in separate planes, which Pillow mixes up: save them interleaved")
    if image.mode == "F" or image.mode.startswith("I"):
        bits = None if said else _stated_bits(image, file)
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise UserError(f"pixels of mode {image.mode}, {values.min()} to {values.max()}, have no known range: 8 "
                             "or 16 bits are expected")  # fmt: skip
    elif not said and (lower := _unpacking_of_lower_bytes(image)):
        bits = _stated_bits(image, file)
        values = _colours(image, file, lower, all_bits=bits is not None or depths is not None)
    else:
        return None
    if bits is None and not said and depths:
        depths.note(int(values.max()))
    return Image.fromarray(_eight_bits(values.astype(np.uint16), bits, image.format)).convert("RGB")


def _eight_bits(values: np.ndarray, bits: int | None, kind: str | None) -> np.ndarray:
    """Return the upper 8 of ``bits`` bits, of 16 where the file says nothing, as uint8."""
    import numpy as np

    if bits is None or bits == 16:
        return (values >> 8).astype(np.uint8)
    beyond = int(values.max()) >= 2**bits
    if beyond and kind != "PNG":
        raise UserError(f"values up to {values.max()}, but the file says that it uses {bits} bits")
    if beyond or (kind == "PNG" and _spread(values, bits)):
        return (values >> 8).astype(np.uint8)
    if bits < 8:
        return (values.astype(np.uint32) * 255 // (2**bits - 1)).astype(np.uint8)
    return (values >> (bits - 8)).astype(np.uint8)


def _spread(values: np.ndarray, bits: int) -> bool:
    """Tell whether values below 2^bits are dark ones of 16 bits, as PNG demands, and not ones of ``bits`` bits.

    By PNG's specification, values of fewer bits are spread over 16, and ``sBIT`` tells how to get them back: the lower
    bits are zero, or follow from the upper ones. Not all programs do so.
    """
    import numpy as np

    original = (values >> (16 - bits)).astype(np.float64)
    spread = np.rint(original * 65535 / (2**bits - 1))
    return bool((values == original * 2 ** (16 - bits)).all() or (values == spread).all())


def _stated_bits(image: Image.Image, file: IO[bytes]) -> int | None:
    """Return how many of 16 bits are used, as the file says; None if it says nothing."""
    if image.format == "PNG":
        return _png_significant_bits(file)
    tags = getattr(image, "tag_v2", None)
    if image.format != "TIFF" or tags is None:
        return None
    widths = set(tags.get(_TIFF_BITS, ()))
    if widths and max(widths) < 16:
        return max(widths)
    for tag in _TIFF_MAXIMA:
        stated = tags.get(tag, ())
        for bits in range(8, 17):
            if stated and max(stated if isinstance(stated, tuple) else (stated,)) == 2**bits - 1:
                return bits
    return None


def _png_significant_bits(file: IO[bytes]) -> int | None:
    """Return the largest number in a PNG file's ``sBIT``, which Pillow ignores; leave the file where it was."""
    place = file.tell()
    try:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind in (b"IDAT", b"IEND"):
                break
            if kind == b"sBIT":
                stated = max(file.read(min(length, 4)), default=0)
                return stated if 1 <= stated <= 16 else None
            file.seek(length + 4, 1)
        return None
    finally:
        file.seek(place)


def _unpacking_of_lower_bytes(image: Image.Image) -> str:
    """Return how Pillow would unpack the lower bytes of colours of 16 bits; '' if the image holds no such colours.

    Pillow keeps every other byte. Told that the file is of the other byte order, it keeps those that it would leave
    out. Grey with alpha has no other order, but is as wide as four channels of 8 bits.
    """
    tiles = getattr(image, "tile", [])
    unpacking = _unpacking(tiles[0].args) if len({_unpacking(tile.args) for tile in tiles}) == 1 else ""
    if unpacking == "LA;16B":
        return "RGBA"
    if not re.fullmatch(r"RGB[AX]?;16[BLN]", unpacking):
        return ""
    big_endian = unpacking.endswith("B") or (unpacking.endswith("N") and sys.byteorder == "big")
    return unpacking[:-1] + ("L" if big_endian else "B")


def _unpacking(args: Any) -> str:
    return str(args[0] if isinstance(args, tuple) and args else args)


def _colours(image: Image.Image, file: IO[bytes], lower: str, all_bits: bool) -> np.ndarray:
    """Return colours as 16 bits, (h, w, 3); the lower 8 are left zero without ``all_bits``."""
    import numpy as np
    from PIL import Image

    upper = np.asarray(image.convert("RGB")).astype(np.uint16) << 8
    if not all_bits or upper.max() >= 2**15:
        return upper
    file.seek(0)
    with Image.open(file, formats=[str(image.format)]) as again:
        again.tile = [
            tile._replace(args=(lower, *tile.args[1:]) if isinstance(tile.args, tuple) else lower)
            for tile in again.tile
        ]
        channels = np.asarray(again)
        return upper | (channels[..., 1:2] if lower == "RGBA" else channels[..., :3])
