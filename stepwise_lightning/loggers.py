"""Where the loggers of a Trainer write: one folder for each run, and TensorBoard's writers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import lightning as L

__all__ = ["CHECKPOINTS", "WITHOUT_LOGGER", "boards", "free_name", "run_folder"]

CHECKPOINTS = "checkpoints"  # the folder of a run that holds them
WITHOUT_LOGGER = "stepwise_runs"  # in the Trainer's default_root_dir, where there is no logger

_folders: WeakKeyDictionary[Any, Path] = WeakKeyDictionary()


def run_folder(trainer: L.Trainer) -> Path:
    """Return the folder that this run writes to; all ranks must ask together, and get the same.

    It is the log directory of TensorBoard's and CSV's loggers, and ``save_dir/name/version`` of every other, where
    Lightning puts checkpoints too. Without a logger each Trainer gets the next free
    ``default_root_dir/stepwise_runs/version_N``; a run that is continued from a checkpoint there goes on in its own.
    """
    folder = trainer.log_dir  # a broadcast
    if not trainer.loggers:
        if trainer not in _folders:
            _folders[trainer] = _without_logger(trainer)
        return Path(trainer.strategy.broadcast(str(_folders[trainer])))
    logger = trainer.loggers[0]
    if not hasattr(logger, "log_dir"):
        name, version = str(logger.name or ""), logger.version
        version = f"version_{version}" if isinstance(version, int) else str(version or "")
        folder = str(Path(logger.save_dir or trainer.default_root_dir, name, version))
    return Path(trainer.strategy.broadcast(folder or str(trainer.default_root_dir)))


def _without_logger(trainer: L.Trainer) -> Path:
    runs = Path(trainer.default_root_dir, WITHOUT_LOGGER)
    if trainer.ckpt_path is not None and Path(trainer.ckpt_path).parent.name == CHECKPOINTS:
        own = Path(trainer.ckpt_path).parent.parent
        if own.parent.resolve() == runs.resolve():
            return own
    taken = [path.name.removeprefix("version_") for path in runs.glob("version_*")]
    return runs / f"version_{max((int(number) for number in taken if number.isdecimal()), default=-1) + 1}"


def free_name(stem: str, is_taken: Callable[[str], bool]) -> str:
    """Return ``stem``, or the first of ``stem-v1``, ``stem-v2``, … that is not taken: nothing is overwritten."""
    name, number = stem, 0
    while is_taken(name):
        number += 1
        name = f"{stem}-v{number}"
    return name


def boards(trainer: L.Trainer) -> list[Any]:
    """Return the TensorBoard writers, of ``lightning`` as of ``pytorch_lightning``, whose loggers share no class."""
    writers = [getattr(logger, "experiment", None) for logger in trainer.loggers]
    return [writer for writer in writers if hasattr(writer, "add_custom_scalars")]
