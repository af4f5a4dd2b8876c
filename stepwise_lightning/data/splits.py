"""Which images of a folder are for training, and which are held out.

A folder is split by its subfolders if one is named for training and another for validation or testing: ``train``,
``Training``, ``val``, ``valid``, ``validation``, ``dev``, ``eval``, ``holdout``, ``test``, ``Testing``, ``train2017``,
``seg_train``, ``test_set`` and so on, in any capitalisation. Such folders may also lie deeper, where a folder holds
nothing else, as archives unpack. Otherwise every tenth file is held out.

What could be read in two ways is refused in one line: two folders for one split, folders named as splits beside others
that are not, and an image that links put both into training and held-out images.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from stepwise_lightning.data.image_files import Listing, is_folder, list_images, why_left_out
from stepwise_lightning.errors import CannotReadError, UserError

_NAMES = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "validate", "dev", "development", "eval", "evaluation", "holdout", "heldout"),
    "test": ("test", "testing", "tst"),
}
# Words that stand beside these in the names of folders; digits do too.
_FILLERS = {"data", "dataset", "folder", "image", "images", "img", "imgs", "seg", "set", "split"}
_SPLITS = {name: split for split, names in _NAMES.items() for name in names}


@dataclass(frozen=True)
class Part:
    """The images of one split.

    Attributes:
        base: the folder whose first-level subfolders are the classes.
        paths: of the images, sorted.

    """

    base: Path
    paths: list[str]

    def class_names(self) -> list[str]:
        """Return the first-level subfolder of ``base`` that each image is in, '' if none."""
        depth = _depth(self.base)
        parts = (path[depth:].partition(os.sep) for path in self.paths)
        return [first if separator else "" for first, separator, _ in parts]


def split_named(folder: str) -> str:
    """Return ``train``, ``val`` or ``test`` if that is what a folder's name says, otherwise ''."""
    words = [word for word in re.split(r"[\W_\d]+", folder.lower()) if word not in _FILLERS]
    name = "".join(words)
    return _SPLITS.get(name) or _SPLITS.get(re.sub("(data|set|images)$", "", name), "")


def split_folder(folder: Path) -> tuple[dict[str, Part], Counter[str]]:
    """Return the images for ``train``, ``val`` and ``test``, and what was left out, counted for each reason.

    Where only one of ``val`` and ``test`` is given, it serves for both. A folder that is not split, or has nothing but
    ``train/``, is split by file: every tenth is held out.

    Raises:
        ValueError: no images, or too few; folders that can be read in two ways; an image in two splits.
        CannotReadError: a folder may not be read (an OSError too).

    """
    if splits := _given_splits(folder):
        return _by_folder(folder, splits)
    listing = list_images(folder)
    chain = _single_folders(folder, listing.paths)
    for place in chain[1:]:
        if splits := _given_splits(place):
            parts, left_out = _by_folder(place, splits)
            return parts, left_out | listing.left_out
    _refuse_ambiguous(chain[-1], listing.paths)
    base = next((place for place in reversed(chain[1:]) if split_named(place.name)), folder)
    return _by_file(folder, base, listing), listing.left_out


def _by_file(folder: Path, base: Path, listing: Listing) -> dict[str, Part]:
    paths = listing.paths
    if len(paths) < 10:
        raise UserError(f"too few images in {str(folder)!r} to hold some out: {len(paths)}, at least 10 are needed")
    train = [path for number, path in enumerate(paths) if number % 10 != 9]
    held_out = Part(base, paths[9::10])
    _refuse_shared(train, held_out.paths, listing.identities)
    return {"train": Part(base, train), "val": held_out, "test": held_out}


def _by_folder(folder: Path, splits: dict[str, Path]) -> tuple[dict[str, Part], Counter[str]]:
    listings = {split: list_images(place) for split, place in splits.items()}
    parts, left_out = {}, _beside(folder, splits)
    identities: dict[str, tuple[int, int]] = {}
    for split, listing in listings.items():
        chain = _single_folders(splits[split], listing.paths)  # seg_train/seg_train/cat
        base = next((place for place in reversed(chain) if split_named(place.name) == split), splits[split])
        parts[split] = Part(base, listing.paths)
        left_out += listing.left_out
        identities |= listing.identities
    for split, part in parts.items():
        if split != "train":
            _refuse_shared(parts["train"].paths, part.paths, identities)
    held_out = parts.get("val") or parts["test"]
    return {"val": held_out, "test": held_out} | parts, left_out


def _given_splits(folder: Path) -> dict[str, Path]:
    """Return the folder of each split, if one is for training and another is not; {} otherwise."""
    named = defaultdict(list)
    for entry in _entries(folder):
        split = split_named(entry.name)
        if split and is_folder(entry) and not why_left_out(entry):
            named[split].append(entry.name)
    if "train" not in named or len(named) == 1:
        return {}
    for split, names in named.items():
        if len(names) > 1:
            raise UserError(f"{_listed(names)} in {str(folder)!r} are all named for one split, {split}: keep one")
    return {split: folder / names[0] for split, names in named.items()}


def _refuse_ambiguous(folder: Path, paths: list[str]) -> None:
    """Refuse subfolders that are named as splits, or hold splits, but cannot all be read as such."""
    inside: dict[str, set[str]] = defaultdict(set)  # the subfolders with images of each subfolder, '' for the latter
    direct = False
    for place in sorted({os.path.dirname(path) + os.sep for path in paths}):
        first, second, *_ = *place[_depth(folder) :].split(os.sep), ""
        if first:
            inside[first].add(second)
        direct |= not first
    for name, subfolders in inside.items():
        splits = {split_named(subfolder) for subfolder in subfolders} - {""}
        if "train" in splits and len(splits) > 1:
            raise UserError(
                f"{str(folder / name)!r} is split into folders, but there are images beside it in {str(folder)!r}: "
                f"give {str(folder / name)!r} as the data, or put train/ and val/ directly into {str(folder)!r}"
            )
    named = sorted(name for name in inside if split_named(name))
    if not named or (len(inside) == 1 and not direct):
        return
    if len(named) == 1 and split_named(named[0]) == "train" and inside[named[0]] == {""} and not direct:
        # Bus, plane and train are classes.
        rank_zero_info(f"{_listed(sorted(inside))} in {str(folder)!r} are read as classes: there is no val/ or test/")
        return
    raise UserError(
        f"{_listed(named)} in {str(folder)!r} {'is' if len(named) == 1 else 'are'} named for a split, but train/ with "
        "val/ or test/ is expected then: add what is missing, move the other images away, or rename a class"
    )


def _refuse_shared(train: list[str], held_out: list[str], identities: dict[str, tuple[int, int]]) -> None:
    """Refuse an image that is for training and held out, through links. Copies are not noticed."""
    by_identity = {identities[name]: name for name in train if name in identities}
    alike = (name for name in held_out if identities.get(name) in by_identity)
    # On file systems laid over others, folders may state the same of different files.
    shared = [name for name in alike if os.path.samefile(name, by_identity[identities[name]])]
    if shared:
        others = f", and {len(shared) - 1} more" if len(shared) > 1 else ""
        raise UserError(
            f"links put an image both into the training and the held-out images: {shared[0]!r} is "
            f"{by_identity[identities[shared[0]]]!r}{others}; remove one of the two names"
        )


def _beside(folder: Path, splits: dict[str, Path]) -> Counter[str]:
    """Count what lies beside the folders of splits."""
    left_out: Counter[str] = Counter()
    for entry in _entries(folder):
        if (reason := why_left_out(entry)) or Path(entry.path) not in splits.values():
            kind = f"folder beside the splits ({entry.name!r})" if is_folder(entry) else "image beside the splits"
            left_out[reason or kind] += 1
    return left_out


def _single_folders(folder: Path, paths: list[str]) -> list[Path]:
    """Return ``folder`` and, from the outside in, the folders below it that hold all images."""
    common = os.path.commonpath([Path(path).parent for path in (paths[0], paths[-1])])  # they are sorted
    inside = Path(common).relative_to(folder).parts
    return [folder.joinpath(*inside[:depth]) for depth in range(len(inside) + 1)]


def _depth(base: Path) -> int:
    """Return where the path of what is in a folder goes on after the folder's."""
    return len(str(base / "x")) - 1


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as inside:
            return sorted(inside, key=lambda entry: entry.name)
    except OSError as error:
        raise CannotReadError(f"the folder {str(folder)!r} cannot be read: {error.strerror}") from error


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
