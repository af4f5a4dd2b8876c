"""Find the image files of a folder, and split them into training and held-out images.

A folder is split by its subfolders if one is named for training and another one for validation or testing, such as
``train``, ``Training``, ``val``, ``dev``, ``test``, ``train2017`` or ``seg_train``, in any capitalisation. They may be
nested deeper, as archives unpack. Otherwise every tenth file is held out.

Ambiguous folders raise an error: two folders for one split, a folder named for a split next to other folders, and links
that put one image into both the training and the held-out images.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from stepwise_lightning.data.image_files import image_formats
from stepwise_lightning.errors import CannotReadError, UserError

_NUM_REASONS = 8  # reasons for ignoring files that are listed separately
_CURRENT = os.path.join(os.curdir, "")
_SYSTEM_FILES = {  # of operating systems, archives and storage devices
    "$recycle.bin", "#recycle", "#snapshot", "@eadir", "@recycle", "__macosx", "__pycache__", "desktop.ini",
    "ehthumbs.db", "icon\r", "lost+found", "system volume information", "thumbs.db",
}  # fmt: skip
_NAMES = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "validate", "dev", "development", "eval", "evaluation", "holdout", "heldout"),
    "test": ("test", "testing", "tst"),
}
_SPLITS = {name: split for split, names in _NAMES.items() for name in names}
# Words that may accompany the names, as digits may.
_FILLERS = {"data", "dataset", "folder", "image", "images", "img", "imgs", "seg", "set", "split"}


@dataclass(frozen=True)
class Listing:
    """Image files below a folder."""

    paths: list[str]  #: sorted as pathlib sorts; strings, because 100 000 ``Path`` objects take a second
    identities: dict[str, tuple[int, int]]  #: device and inode by path, equal for links to one file
    left_out: Counter[str]  #: number of ignored files and folders, by reason


@dataclass(frozen=True)
class Split:
    """Images of one split."""

    paths: list[str]  #: sorted
    class_names: list[str]  #: the first-level subfolder of each image, '' for none

    @classmethod
    def of(cls, paths: list[str], base: Path) -> Split:
        """Return the split whose class folders are in ``base``."""
        parts = (path[_prefix_length(base) :].partition(os.sep) for path in paths)
        return cls(paths, [first if separator else "" for first, separator, _ in parts])


def list_images(folder: Path) -> Listing:
    """Return the image files below ``folder`` at any depth, without opening them.

    Image files have an ending that Pillow reads. Hidden and system files and folders are ignored. Symbolic links are
    followed, as in torchvision, but each folder is read once and under its own name, which ends loops and prevents
    duplicates. A broken link is returned, and raises when it is read.
    """
    identities: dict[str, tuple[int, int]] = {}
    left_out: Counter[str] = Counter()
    paths = []
    for device, entry in _walk(folder, left_out):
        if reason := reason_to_ignore(entry):
            left_out[reason] += 1
            continue
        path = entry.path.removeprefix(_CURRENT)
        paths.append(path)
        with suppress(OSError):  # a broken link
            status = entry.stat() if entry.is_symlink() else None
            identity = (status.st_dev, status.st_ino) if status else (device, entry.inode())
            if identity[1]:  # 0 on file systems without inodes
                identities[path] = identity
    if not paths:
        reasons = f" (left out: {format_counts(left_out)})" if left_out else ""
        raise UserError(
            f"no images in {str(folder)!r}{reasons}: expected files ending in .png, .jpg, .tif or another ending that "
            "Pillow reads"
        )
    # A null character sorts before every character of a name, as the parts of a pathlib path do.
    return Listing(sorted(paths, key=lambda path: path.replace(os.sep, "\0")), identities, left_out)


def split_folder(folder: Path) -> tuple[dict[str, Split], Counter[str]]:
    """Return the splits ``train``, ``val`` and ``test``, and the number of ignored files by reason.

    A single ``val`` or ``test`` serves as both. A folder without split folders, or with ``train/`` alone, is split by
    file: every tenth is held out.
    """
    if splits := _split_folders(folder):
        return _split_by_folder(folder, splits)
    listing = list_images(folder)
    chain = _single_folders(folder, listing.paths)
    for place in chain[1:]:
        if splits := _split_folders(place):
            parts, left_out = _split_by_folder(place, splits)
            return parts, left_out | listing.left_out
    _check_ambiguous_names(chain[-1], listing.paths)
    base = next((place for place in reversed(chain[1:]) if split_name(place.name)), folder)
    return _split_by_file(folder, base, listing), listing.left_out


def split_name(folder: str) -> str:
    """Return the split, ``train``, ``val`` or ``test``, that a folder is named for, '' for none."""
    words = [word for word in re.split(r"[\W_\d]+", folder.lower()) if word not in _FILLERS]
    name = "".join(words)
    return _SPLITS.get(name) or _SPLITS.get(re.sub("(data|set|images)$", "", name), "")


def format_counts(counts: Counter[str]) -> str:
    """Return for example ``12 hidden, 3 .txt, 1 .pdf``: at most eight reasons, most frequent first."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    others = sum(count for _, count in ranked[_NUM_REASONS:])
    texts = [f"{count} {reason}" for reason, count in ranked[:_NUM_REASONS]]
    return ", ".join(texts + ([f"{others} others"] if others else []))


def reason_to_ignore(entry: os.DirEntry[str]) -> str:
    """Return why a file or folder is ignored, '' if it is not."""
    if entry.name.startswith("."):
        return "hidden"
    if entry.name.lower() in _SYSTEM_FILES:
        return "of the operating system"
    if _is_folder(entry):
        return ""
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix not in image_formats()[0]:
        return repr(suffix)[1:-1] if suffix else "without an ending"
    is_regular = entry.is_file(follow_symlinks=False)  # needs no system call
    if not is_regular and os.path.exists(entry.path) and not os.path.isfile(entry.path):  # opening a pipe would block
        return "neither file nor folder"
    return ""


def _walk(folder: Path, left_out: Counter[str]) -> Iterator[tuple[int, os.DirEntry[str]]]:
    """Yield the device and the entry of each file below ``folder``; count ignored folders in ``left_out``."""
    visited: set[tuple[int, int]] = set()
    waiting = deque([str(folder)])
    while waiting:
        place = waiting.pop()
        entries = _entries(place)
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        for entry in entries:
            if not _is_folder(entry):
                yield status.st_dev, entry
            elif reason := reason_to_ignore(entry):
                left_out[reason] += 1
            else:  # links last: every folder is read under its own name
                (waiting.appendleft if entry.is_symlink() else waiting.append)(entry.path)


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise CannotReadError(f"the folder {str(folder)!r} cannot be read: {error.strerror}") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _split_by_file(folder: Path, base: Path, listing: Listing) -> dict[str, Split]:
    paths = listing.paths
    if len(paths) < 10:
        raise UserError(f"too few images in {str(folder)!r} to hold some out: {len(paths)}, at least 10 are needed")
    train = Split.of([path for number, path in enumerate(paths) if number % 10 != 9], base)
    held_out = Split.of(paths[9::10], base)
    _check_shared(train.paths, held_out.paths, listing.identities)
    return {"train": train, "val": held_out, "test": held_out}


def _split_by_folder(folder: Path, folders: dict[str, Path]) -> tuple[dict[str, Split], Counter[str]]:
    parts, left_out, identities = {}, Counter[str](), dict[str, tuple[int, int]]()
    for entry in _entries(folder):
        if (reason := reason_to_ignore(entry)) or Path(entry.path) not in folders.values():
            kind = f"folder beside the splits ({entry.name!r})" if _is_folder(entry) else "image beside the splits"
            left_out[reason or kind] += 1
    for split, place in folders.items():
        listing = list_images(place)
        chain = _single_folders(place, listing.paths)  # for example seg_train/seg_train/cat
        base = next((inner for inner in reversed(chain) if split_name(inner.name) == split), place)
        parts[split] = Split.of(listing.paths, base)
        left_out += listing.left_out
        identities |= listing.identities
    for split, part in parts.items():
        if split != "train":
            _check_shared(parts["train"].paths, part.paths, identities)
    held_out = parts.get("val") or parts["test"]
    return {"val": held_out, "test": held_out} | parts, left_out


def _split_folders(folder: Path) -> dict[str, Path]:
    """Return the subfolder of each split, {} unless there is one for training and one for held-out images."""
    named = defaultdict(list)
    for entry in _entries(folder):
        split = split_name(entry.name)
        if split and _is_folder(entry) and not reason_to_ignore(entry):
            named[split].append(entry.name)
    if "train" not in named or len(named) == 1:
        return {}
    for split, names in named.items():
        if len(names) > 1:
            raise UserError(f"{_join(names)} in {str(folder)!r} are all named for one split, {split}: keep one")
    return {split: folder / names[0] for split, names in named.items()}


def _check_ambiguous_names(folder: Path, paths: list[str]) -> None:
    """Raise if subfolders are named for splits, or contain splits, but cannot all be used as splits."""
    inside: dict[str, set[str]] = defaultdict(set)  # names one level deeper, by subfolder
    for place in {os.path.dirname(path) + os.sep for path in paths}:
        first, second, *_ = *place[_prefix_length(folder) :].split(os.sep), ""
        inside[first].add(second)
    has_images = inside.pop("", None) is not None
    for name, subfolders in sorted(inside.items()):
        splits = {split_name(subfolder) for subfolder in subfolders} - {""}
        if "train" in splits and len(splits) > 1:
            raise UserError(
                f"{str(folder / name)!r} is split into folders, but there are images beside it in {str(folder)!r}: "
                f"give {str(folder / name)!r} as the data, or put train/ and val/ directly into {str(folder)!r}"
            )
    named = sorted(name for name in inside if split_name(name))
    if not named or (len(inside) == 1 and not has_images):
        return
    if [split_name(name) for name in named] == ["train"] and inside[named[0]] == {""} and not has_images:
        rank_zero_info(f"{_join(sorted(inside))} in {str(folder)!r} are read as classes: there is no val/ or test/")
        return
    raise UserError(
        f"{_join(named)} in {str(folder)!r} {'is' if len(named) == 1 else 'are'} named for a split, which needs train/ "
        "and val/ or test/: add what is missing, move the other images away, or rename a class"
    )


def _check_shared(train: list[str], held_out: list[str], identities: dict[str, tuple[int, int]]) -> None:
    """Raise if links put an image into both the training and the held-out images. Copies are not detected."""
    by_identity = {identities[name]: name for name in train if name in identities}
    candidates = (name for name in held_out if identities.get(name) in by_identity)
    # Overlay file systems may report one identity for different files.
    shared = [name for name in candidates if os.path.samefile(name, by_identity[identities[name]])]
    if shared:
        others = f", and {len(shared) - 1} more" if len(shared) > 1 else ""
        raise UserError(
            f"links put an image into both the training and the held-out images: {shared[0]!r} is "
            f"{by_identity[identities[shared[0]]]!r}{others}; remove one of the two names"
        )


def _single_folders(folder: Path, paths: list[str]) -> list[Path]:
    """Return ``folder`` and, from the outside in, the folders below it that contain all images."""
    common = os.path.commonpath([Path(path).parent for path in (paths[0], paths[-1])])  # they are sorted
    inside = Path(common).relative_to(folder).parts
    return [folder.joinpath(*inside[:depth]) for depth in range(len(inside) + 1)]


def _prefix_length(base: Path) -> int:
    return len(str(base / "x")) - 1  # of base and its separator; the path of Path() is empty


def _join(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
