"""The command lines: options that all figures have, and how a command says that it cannot go on."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from stepwise_lightning.errors import CannotWriteError, one_line
from stepwise_lightning.signals import INTERRUPTED

# Options that say where and how, not what.
PLACES = ("out", "root", "download", "resume", "launcher")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line, without the usage."""
        self.exit(2, f"error: {message} (see --help)\n")


def new_parser(command: str, description: str, profiles: dict[str, dict[str, Any]]) -> argparse.ArgumentParser:
    """Return a parser of the options that every figure has; ``command`` is what is typed after ``python -m``."""
    parser = _Parser(
        prog=f"python -m {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    usual = "cpu" if "cpu" in profiles else next(iter(profiles))
    parser.add_argument("--profile", choices=profiles, default=usual, help=f"size of the experiment (default: {usual})")
    parser.add_argument("--data", help="photos, cifar10, stl10 or a folder of images (default: the profile's, photos)")
    parser.add_argument("--out", default="results", help="folder for the outputs (default: results)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of data and weights (default: 0 1 2)")
    parser.add_argument(
        "--resume", action="store_true", help="keep what an earlier call of these options and this code finished"
    )
    parser.add_argument("--root", default="data", help="where cifar10 and stl10 lie (default: data)")
    parser.add_argument("--download", action="store_true", help="fetch them if they are not there")
    parser.add_argument("--launcher", default="", help="put before the commands that train ResNets, for instance srun")
    return parser


def parse(
    parser: argparse.ArgumentParser, profiles: dict[str, dict[str, Any]], arguments: list[str] | None = None
) -> argparse.Namespace:
    """Return the options, with what the profile says of those that were not given."""
    options = parser.parse_args(arguments)
    for key, value in ({"data": "photos"} | profiles[options.profile]).items():
        if getattr(options, key, None) is None:
            setattr(options, key, value)
    return options


def data_name(data: str) -> str:
    """Return what a figure calls the data set that an option names."""
    names = {"photos": "scikit-image's photographs (not the paper's data)", "cifar10": "CIFAR-10", "stl10": "STL-10"}
    return names.get(data, f"{Path(data).resolve().name} (folder)")


def check_writable(directory: Path) -> None:
    """Refuse an output folder before hours are spent; nothing is left behind.

    Raises:
        CannotWriteError: it is not a folder, or cannot be written to.

    """
    existing = next(path for path in (directory, *directory.resolve().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise CannotWriteError(f"cannot write to {str(existing)!r}: choose another folder with --out")


def refusal(error: Exception) -> int:
    """Say in one line why a command cannot go on, and return its exit status, 2; a bug is raised again."""
    line = one_line(error)
    if line is None:
        raise error
    print(f"error: {line}", file=sys.stderr)
    return 2


def interrupted() -> NoReturn:
    """End the program, not one figure only, after Ctrl-C."""
    print("\ninterrupted: what is finished is kept, and with --resume the rest goes on", file=sys.stderr)
    sys.exit(INTERRUPTED)
