"""Loggers of any library: their folder, and their TensorBoard writer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L

__all__ = ["folder_of", "tensorboard_writer", "tensorboard_writers"]


def folder_of(logger: Any, root: str | Path) -> Path:
    """Return the folder that a logger has for its run: ``log_dir``, or ``save_dir/name/version`` if it has none.

    Args:
        logger: of ``lightning``, ``pytorch_lightning``, or like them.
        root: stands in for a ``save_dir`` of None.

    """
    folder = getattr(logger, "log_dir", None)
    if isinstance(folder, (str, os.PathLike)):  # the logger of fast_dev_run has all attributes
        return Path(folder)
    name, version = str(logger.name or ""), logger.version
    version = f"version_{version}" if isinstance(version, int) else str(version or "")
    return Path(logger.save_dir or root, name, version)


def tensorboard_writer(logger: Any) -> Any:
    """Return a logger's TensorBoard writer, of ``lightning`` or ``pytorch_lightning``, who share no class; or None."""
    writer: Any = getattr(logger, "experiment", None)
    # The log_dir, because the logger of fast_dev_run has a writer that has everything.
    is_board = hasattr(writer, "add_custom_scalars") and isinstance(writer.log_dir, (str, os.PathLike))
    return writer if is_board else None


def tensorboard_writers(trainer: L.Trainer) -> list[Any]:
    """Return the TensorBoard writers of a Trainer's loggers."""
    return [board for board in map(tensorboard_writer, trainer.loggers) if board is not None]
