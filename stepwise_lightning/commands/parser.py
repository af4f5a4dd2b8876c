"""Parsers that report a mistake in one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

__all__ = ["Parser"]


class Parser(argparse.ArgumentParser):
    """Parser of the command ``stepwise <command>``."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"stepwise {command}", description=description)

    def error(self, message: str) -> NoReturn:
        """Exit with one line and status 2."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")
