"""Parsers of commands: what is mistaken is said in one line, as everywhere."""

from __future__ import annotations

import argparse
from typing import NoReturn

__all__ = ["Parser"]


class Parser(argparse.ArgumentParser):
    """Of one command, ``stepwise <command>``; ``description`` says what it does."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"stepwise {command}", description=description)

    def error(self, message: str) -> NoReturn:
        """End with one line and status 2."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")
