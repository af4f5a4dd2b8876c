"""Command-line options that all figures share, and error reporting."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from stepwise_lightning import FixedCropPairs
from stepwise_lightning.data import load_image_set, load_images
from stepwise_lightning.data.image_sets import DATA_SETS
from stepwise_lightning.errors import INTERRUPTED, CannotWriteError, UserError, one_line

# Options that do not affect the numbers.
PLACES = ("out", "root", "download", "resume", "launcher")
MIN_IMAGES = 20  # of figures that train on pairs of crops


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print the error in one line, without the usage."""
        self.exit(2, f"error: {message} (see --help)\n")


def new_parser(
    command: str, description: str, profiles: dict[str, dict[str, Any]], with_seeds: bool = True
) -> argparse.ArgumentParser:
    """Return a parser with the shared options; ``command`` follows ``python -m`` in the usage."""
    parser = _Parser(
        prog=f"python -m {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = "cpu" if "cpu" in profiles else next(iter(profiles))
    parser.add_argument(
        "--profile", choices=profiles, default=default, help=f"size of the experiment (default: {default})"
    )
    parser.add_argument(
        "--data", help="photos, cifar10, stl10 or a folder of images (default: set by the profile, usually photos)"
    )
    parser.add_argument("--out", default="results", help="output folder (default: results)")
    if with_seeds:
        parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of data and weights (default: 0)")
        parser.add_argument(
            "--resume", action="store_true", help="keep results that were computed with the same options and code"
        )
    parser.add_argument("--root", default="data", help="folder of cifar10 and stl10 (default: data)")
    parser.add_argument("--download", action="store_true", help="download missing data sets")
    parser.add_argument("--launcher", default="", help="prefix of the commands that train ResNets, for example srun")
    return parser


def parse(
    parser: argparse.ArgumentParser, profiles: dict[str, dict[str, Any]], arguments: list[str] | None = None
) -> argparse.Namespace:
    """Return the options; the profile sets those that are missing."""
    options = parser.parse_args(arguments)
    for key, value in ({"data": "photos"} | profiles[options.profile]).items():
        if getattr(options, key, None) is None:
            setattr(options, key, value)
    return options


def data_name(data: str) -> str:
    """Return the display name of a data set option."""
    names = {"photos": "scikit-image's photographs (not the paper's data)", "cifar10": "CIFAR-10", "stl10": "STL-10"}
    return names.get(data, f"{Path(data).resolve().name} (folder)")


def fixed_pairs(options: argparse.Namespace, seed: int, steps_per_epoch: int = 1) -> FixedCropPairs:
    """Return the crop pairs that the options describe, downloaded if requested, with both views loaded."""
    pairs = FixedCropPairs(
        options.data, options.num_pairs, options.crop_size, seed, steps_per_epoch, options.root, options.download
    )
    pairs.prepare_data()
    pairs.setup()
    return pairs


def require_images(options: argparse.Namespace, num_train: int, num_held_out: int) -> None:
    """Raise a UserError if a folder has too few images of a split, or no classes; other data sets are large enough."""
    if options.data in DATA_SETS:
        return
    train, held_out = (load_image_set(options.data, split, options.root) for split in ("train", "val"))
    if len(train) < num_train or len(held_out) < num_held_out:
        raise UserError(
            f"{options.data!r} has {len(train)} training and {len(held_out)} held-out images, and this figure needs at "
            f"least {num_train} and {num_held_out}: choose another folder with --data"
        )
    if not (train.labels >= 0).any():
        raise UserError(
            f"the images in {options.data!r} have no classes, which this figure needs: put each class into a subfolder"
        )


def limit_pairs(options: argparse.Namespace) -> dict[str, int]:
    """Reduce ``num_pairs`` and ``held_out`` of the profile to the number of images; return the changed settings.

    Raises:
        ValueError: fewer images than MIN_IMAGES.

    """
    total = len(load_images(options.data, options.root, options.download))
    sizes = {name: getattr(options, name) for name in ("num_pairs", "held_out") if hasattr(options, name)}
    needed = sum(sizes.values())
    if total >= needed:
        return {}
    if total < MIN_IMAGES:
        raise UserError(f"{options.data!r} has {total} images, and this figure needs at least {MIN_IMAGES}")
    reduced = {name: total * size // needed for name, size in sizes.items()}
    vars(options).update(reduced)
    text = ", ".join(f"{name} {size} instead of {sizes[name]}" for name, size in reduced.items())
    print(f"{options.data} has {total} images: {text}")
    return reduced


def check_writable(directory: Path) -> None:
    """Check an output folder before a long computation, without creating it.

    Raises:
        CannotWriteError: the path is not a folder, or not writable.

    """
    existing = next(path for path in (directory, *directory.resolve().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise CannotWriteError(f"cannot write to {str(existing)!r}: choose another folder with --out")


def report_error(error: Exception) -> int:
    """Print a user error in one line and return exit status 2; raise any other exception again."""
    line = one_line(error)
    if line is None:
        raise error
    print(f"error: {line}", file=sys.stderr)
    return 2


def exit_interrupted(remedy: str = "continue with --resume") -> NoReturn:
    """Exit after Ctrl-C, also when more figures are waiting."""
    print(f"\ninterrupted: finished results are kept; {remedy}", file=sys.stderr)
    sys.exit(INTERRUPTED)
