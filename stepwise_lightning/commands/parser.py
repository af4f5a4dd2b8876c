"""Parsers that report a mistake in one line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

_ENDINGS = (".png", ".pdf", ".svg")


class Parser(argparse.ArgumentParser):
    """Parser of the command ``stepwise <command>``."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"stepwise {command}", description=description)

    def error(self, message: str) -> NoReturn:
        """Exit with one line and status 2."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Add the device and the number of data workers, named as in Lightning."""
    parser.add_argument("--accelerator", default="auto", choices=["auto", "cpu", "gpu"], help="device (%(default)s)")
    parser.add_argument("--num-workers", type=_count, default=0, help="processes that read images (%(default)s)")


def add_figure_file(parser: argparse.ArgumentParser, default: str) -> None:
    """Add ``--out``, the file of a figure."""
    parser.add_argument("--out", type=_figure_file, default=Path(default), metavar="FILE",
                        help=f"file to write, ending in {', '.join(_ENDINGS)} (%(default)s)")  # fmt: skip


def _figure_file(text: str) -> Path:
    if Path(text).suffix not in _ENDINGS:
        raise argparse.ArgumentTypeError(f"{text} must end in one of {', '.join(_ENDINGS)}")
    return Path(text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text}")
    return int(text)
