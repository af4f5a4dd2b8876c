"""Image files: which ones a folder holds, and what each is turned into. Nothing is skipped silently.

A file that cannot be read is refused, not skipped: without it the held-out tenth, the order and the statistics would be
those of another data set, and two machines with one folder would train on different images.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from stepwise_lightning.data.bit_depth import Depths, upper_eight_bits
from stepwise_lightning.errors import CannotReadError, UserError

if TYPE_CHECKING:  # importing this package needs only torch and lightning
    from PIL import Image

_NAMED = 3  # of the files that cannot be read
_REASONS = 8  # for leaving files out, that are named
_HERE = os.path.join(os.curdir, "")
# Formats that Pillow reads with another program or not at all, and documents, videos and tables rather than images.
_NO_IMAGES = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF"}
# Files and folders that operating systems, archives and storage devices put beside the user's.
_OF_SYSTEMS = {
    "$recycle.bin", "#recycle", "#snapshot", "@eadir", "@recycle", "__macosx", "__pycache__", "desktop.ini",
    "ehthumbs.db", "icon\r", "lost+found", "system volume information", "thumbs.db",
}  # fmt: skip


@dataclass(frozen=True)
class Listing:
    """The image files below a folder.

    Attributes:
        paths: sorted as pathlib does, folder by folder; strings, since 100 000 of pathlib's take a second to make.
        identities: of each path device and inode, as far as they are known without looking at each file: two paths of
            one file have the same, whatever links lead to it. A link to nothing has none.
        left_out: how many files and folders were left out, for each reason.

    """

    paths: list[str]
    identities: dict[str, tuple[int, int]]
    left_out: Counter[str]


def image_paths(folder: Path) -> list[Path]:
    """Return the image files below ``folder`` at any depth, sorted by path; see :func:`list_images`."""
    return [Path(path) for path in list_images(folder).paths]


def list_images(folder: Path) -> Listing:
    """Return the image files below ``folder`` at any depth, and what was left out. No file is opened.

    An image file is one whose name ends as those that the installed Pillow reads without another program. Hidden files
    and folders, and those that operating systems put beside the user's, are left out.

    Symbolic links are followed, as torchvision does, but each folder is read once, however many links lead to it, and
    under its own name rather than a link's: loops end, and no image is in two splits because a link repeats it. A link
    to an image that is gone is returned, and refused when it is read.

    Raises:
        ValueError: there are none.
        CannotReadError: a folder may not be read (an OSError too).

    """
    identities: dict[str, tuple[int, int]] = {}
    left_out: Counter[str] = Counter()
    paths = []
    for device, entry in _entries(folder, left_out):
        reason = why_left_out(entry)
        if reason:
            left_out[reason] += 1
            continue
        path = entry.path.removeprefix(_HERE)
        paths.append(path)
        with suppress(OSError):  # a link to nothing
            identity = device, entry.inode()
            if entry.is_symlink():
                status = entry.stat()
                identity = status.st_dev, status.st_ino
            if identity[1]:  # some file systems have none
                identities[path] = identity
    if not paths:
        reasons = f" (left out: {in_words(left_out)})" if left_out else ""
        raise UserError(
            f"no images in {str(folder)!r}{reasons}: expected files ending in .png, .jpg, .tif or another that Pillow "
            "reads"
        )
    # No name has a zero, which comes before all that names can have, as pathlib's parts do.
    return Listing(sorted(paths, key=lambda path: path.replace(os.sep, "\0")), identities, left_out)


def why_left_out(entry: os.DirEntry[str]) -> str:
    """Return why a file or folder is left out, '' if it is not; a folder is judged by its name alone."""
    if entry.name.startswith("."):
        return "hidden"
    if entry.name.lower() in _OF_SYSTEMS:
        return "of the operating system"
    if is_folder(entry):
        return ""
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix not in _readable()[0]:
        return repr(suffix)[1:-1] if suffix else "without an ending"
    usual = entry.is_file(follow_symlinks=False)  # needs no look at the disk
    if not usual and os.path.exists(entry.path) and not os.path.isfile(entry.path):  # a pipe would wait for ever
        return "neither file nor folder"
    return ""


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Tell whether this is a folder, or a link to one."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def in_words(left_out: Counter[str]) -> str:
    """Return for example ``12 hidden, 3 .txt, 1 .pdf``: at most eight reasons, the most frequent first."""
    ranked = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    others = sum(count for _, count in ranked[_REASONS:])
    texts = [f"{count} {reason}" for reason, count in ranked[:_REASONS]]
    return ", ".join(texts + ([f"{others} others"] if others else []))


def read_image(path: str | Path, depths: Depths | None = None) -> Image.Image:
    """Return an image file as RGB, 8 bits per channel.

    Grey images get three equal channels; an alpha channel is dropped, as torchvision does (transparent pixels show the
    colour stored under them); of 9 to 16 bits the upper 8 are kept, see :mod:`stepwise_lightning.data.bit_depth`; of
    several frames the first is taken; EXIF orientation is ignored. Pillow warns of more than 89 million pixels.

    Args:
        path: of the file.
        depths: where to note the largest value of an image of 16 bits that does not say how many of them it uses.

    Raises:
        ValueError: the file cannot be read, is not an image or broken, has more than 179 million pixels, or pixels
            without a known range (32-bit integers beyond 16 bits, floating point).

    """
    from PIL import Image

    try:
        with open(path, "rb") as file, Image.open(file, formats=_readable()[1]) as image:
            if (deep := upper_eight_bits(image, file, depths)) is not None:
                return deep
            # Pillow would warn that a palette may hold transparency in several ways.
            return (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")
    except Exception as error:  # on damaged files Pillow raises whatever its decoders come across
        raise UserError(f"{str(path)!r} cannot be read as an image ({_reason(error)}): remove or repair it") from error


def pixels(image: Image.Image) -> Tensor:
    """Return an RGB image as uint8 (3, h, w)."""
    from torchvision.transforms.v2.functional import pil_to_tensor

    return pil_to_tensor(image)


def read_all(paths: list[str], depths: Depths | None = None) -> Iterator[Tensor]:
    """Yield the pixels of each image, uint8 (3, h, w), behind a progress bar; ``depths`` as for :func:`read_image`.

    Raises:
        ValueError: at the end, some could not be read; it counts them and names the first ones.

    """
    refusals = []
    for path in _progress(paths):
        try:
            image = pixels(read_image(path, depths))
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


def _entries(folder: Path, left_out: Counter[str]) -> Iterator[tuple[int, os.DirEntry[str]]]:
    """Yield what is below ``folder``, except folders, and on which device; count the folders that are not entered."""
    seen: set[tuple[int, int]] = set()
    waiting = deque([str(folder)])
    while waiting:
        place = waiting.pop()
        try:
            status = os.stat(place)
            with os.scandir(place) as inside:
                entries = sorted(inside, key=lambda entry: entry.name)
        except OSError as error:
            raise CannotReadError(f"the folder {place!r} cannot be read: {error.strerror}") from error
        if (identity := (status.st_dev, status.st_ino)) in seen:
            continue
        seen.add(identity)
        for entry in entries:
            if not is_folder(entry):
                yield status.st_dev, entry
            elif reason := why_left_out(entry):
                left_out[reason] += 1
            else:  # links wait until every folder has been read under its own name
                (waiting.appendleft if entry.is_symlink() else waiting.append)(entry.path)


@lru_cache(maxsize=1)
def _readable() -> tuple[frozenset[str], tuple[str, ...]]:
    """Return the endings and the formats of the images that the installed Pillow reads by itself."""
    from PIL import Image

    registered = Image.registered_extensions()  # loads all of Pillow's plug-ins, which fills OPEN in their order
    formats = tuple(name for name in Image.ID if name in Image.OPEN and name not in _NO_IMAGES)
    known = {*formats, "MPO"}  # which Pillow opens as JPEG
    endings = {ending for ending, name in registered.items() if name in known}
    return frozenset(endings - {".pfm"}), formats  # .pfm: floating point, whose range is not known


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _progress(paths: list[str]) -> Iterable[str]:
    from tqdm import tqdm

    return tqdm(paths, desc="reading images", leave=False, delay=1, disable=None)  # None: but on a terminal
