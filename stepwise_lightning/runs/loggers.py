"""Loggers of any library: kind, folder, TensorBoard writer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L

_KINDS = ("TensorBoardLogger", "CSVLogger", "WandbLogger", "MLFlowLogger")


def logger_kind(logger: Any) -> str:
    """Return the kind of a logger or of its class: ``TensorBoardLogger``, ``CSVLogger``, …; '' for other classes.

    The names of the base classes decide, because ``lightning`` and ``pytorch_lightning`` share no class.
    """
    cls = logger if isinstance(logger, type) else type(logger)
    return next((base.__name__ for base in cls.__mro__ if base.__name__ in _KINDS), "")


def folder_of(logger: Any, root: str | Path) -> Path:
    """Return the folder of a logger's run: its ``log_dir``, or ``save_dir/name/version`` if it has no ``log_dir``.

    ``root`` replaces a ``save_dir`` of None.
    """
    folder = getattr(logger, "log_dir", None)
    if isinstance(folder, (str, os.PathLike)):  # the logger of fast_dev_run has every attribute
        return Path(folder)
    name, version = str(logger.name or ""), logger.version
    version = f"version_{version}" if isinstance(version, int) else str(version or "")
    return Path(logger.save_dir or root, name, version)


def tensorboard_writer(logger: Any) -> Any:
    """Return the ``SummaryWriter`` of a TensorBoard logger, None for other loggers and on ranks above 0."""
    writer: Any = logger.experiment if logger_kind(logger) == "TensorBoardLogger" else None
    # on other ranks the writer is a dummy with every attribute
    return writer if isinstance(getattr(writer, "log_dir", None), (str, os.PathLike)) else None


def tensorboard_writers(trainer: L.Trainer) -> dict[Any, str]:
    """Return the TensorBoard writers of a Trainer's loggers, each with the start of its tags, from ``prefix``."""
    writers = {logger: tensorboard_writer(logger) for logger in trainer.loggers}
    return {writer: tag_start(logger) for logger, writer in writers.items() if writer is not None}


def tag_start(logger: Any) -> str:
    """Return the start of all tags of a logger: ``a-`` for ``prefix="a"``, which ``log_metrics`` adds."""
    prefix = getattr(logger, "_prefix", "")
    return f"{prefix}{logger.LOGGER_JOIN_CHAR}" if prefix else ""
