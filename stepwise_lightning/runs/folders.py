"""The checkpoints in the folder of a run: that it has begun, and how far each of them is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from stepwise_lightning.errors import UserError, cannot_write
from stepwise_lightning.files import atomic_write_text

VERSIONS = "loggers.json"  # beside the checkpoints of a run with several loggers


def saved_step(path: Path) -> int:
    """Return the step of a checkpoint; ValueError if it cannot be read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    except Exception as error:  # whatever torch and pickle make of foreign bytes
        raise UserError(f"{path} is no checkpoint that can be read: remove it to go on from another") from error


def is_behind(path: Path, step: int) -> bool:
    """Return whether a checkpoint can be read, and is not of a later step."""
    try:
        return saved_step(path) <= step
    except UserError:
        return False


def begin_folder(directory: Path, loggers: list[Any]) -> None:
    """Make the folder of checkpoints, which says that a run has begun, and note the versions of several loggers.

    Raises:
        OSError: it cannot be made.

    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(directory, error) from error
    if len(loggers) > 1:
        versions = [logger.version if isinstance(logger.version, int) else str(logger.version) for logger in loggers]
        atomic_write_text(directory / VERSIONS, json.dumps(versions) + "\n")
