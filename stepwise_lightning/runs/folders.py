"""Folders of runs: location, checkpoints, and the step of each checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import lightning as L
import torch

from stepwise_lightning.errors import UserError, cannot_write
from stepwise_lightning.files import atomic_write_text
from stepwise_lightning.runs.loggers import folder_of

CHECKPOINTS = "checkpoints"  # the folder of a run that holds them
WITHOUT_LOGGER = "stepwise_runs"  # in the Trainer's default_root_dir, where there is no logger
VERSIONS = "loggers.json"  # beside the checkpoints of a run with several loggers

_folders: WeakKeyDictionary[Any, Path] = WeakKeyDictionary()


def run_folder(trainer: L.Trainer, resumed: str | Path | None = None) -> Path:
    """Return the folder that this run writes to; all ranks must ask together, and get the same.

    It is the first logger's (:func:`folder_of`). Without a logger each Trainer gets the next free
    ``default_root_dir/stepwise_runs/version_N``, which is made at once, so that no other run takes it (not under
    ``fast_dev_run``, which writes nothing); a run that is continued from a checkpoint there goes on in its own.

    Args:
        trainer: of the run.
        resumed: the checkpoint that it goes on from, while the Trainer does not know it yet: in ``setup``.

    Raises:
        OSError: the folder of a run without a logger cannot be made.

    """
    folder = None
    if trainer.is_global_zero:
        if trainer.loggers:
            folder = folder_of(trainer.loggers[0], trainer.default_root_dir)
        else:
            if trainer not in _folders:
                _folders[trainer] = _without_logger(trainer, resumed or trainer.ckpt_path)
            folder = _folders[trainer]
    return Path(trainer.strategy.broadcast(str(folder)))


def _without_logger(trainer: L.Trainer, resumed: str | Path | None) -> Path:
    runs = Path(trainer.default_root_dir, WITHOUT_LOGGER)
    if trainer.state.fn == "fit" and resumed is not None and Path(resumed).parent.name == CHECKPOINTS:
        own = Path(resumed).parent.parent
        if own.parent.resolve() == runs.resolve():
            return own
    taken = [path.name.removeprefix("version_") for path in runs.glob("version_*")]
    number = max((int(number) for number in taken if number.isdecimal()), default=-1) + 1
    while not trainer.fast_dev_run:  # type: ignore[attr-defined]
        try:
            (runs / f"version_{number}").mkdir(parents=True)
            break
        except OSError as error:
            if not (runs / f"version_{number}").is_dir():
                raise cannot_write(runs, error) from error
            number += 1  # that of a run that begins at this moment
    return runs / f"version_{number}"


def free_name(stem: str, is_taken: Callable[[str], bool]) -> str:
    """Return ``stem``, or the first of ``stem-v1``, ``stem-v2``, … that is not taken: nothing is overwritten."""
    name, number = stem, 0
    while is_taken(name):
        number += 1
        name = f"{stem}-v{number}"
    return name


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
