"""Folders of runs and the checkpoints in them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import lightning as L
import torch

from stepwise_lightning.errors import CannotWriteError, UserError, cannot_write
from stepwise_lightning.files import local_path
from stepwise_lightning.runs.loggers import folder_of, logger_kind

CHECKPOINTS = "checkpoints"  # folder of checkpoints in the folder of a run
WITHOUT_LOGGER = "stepwise_runs"  # folder of the runs without a logger in default_root_dir

_folders: WeakKeyDictionary[Any, Path] = WeakKeyDictionary()
# Folders of runs that ended in other processes, where the loggers of this process would begin the next version.
_spawned: WeakKeyDictionary[Any, Path] = WeakKeyDictionary()


def run_folder(trainer: L.Trainer, resumed: str | Path | None = None) -> Path:
    """Return the folder of this run; a broadcast, which all ranks must call together.

    It is the folder of the first logger (:func:`folder_of`). Without a logger each Trainer creates the next free
    ``default_root_dir/stepwise_runs/version_N`` (under ``fast_dev_run`` nothing is created); a run that is resumed from
    a checkpoint in such a folder keeps it. In ``setup``, where ``trainer.ckpt_path`` is not yet set, give ``resumed``.
    """
    check_local(trainer)
    folder = folder_of_run(trainer, resumed) if trainer.is_global_zero else None
    return Path(trainer.strategy.broadcast(str(folder)))


def folder_of_run(trainer: L.Trainer, resumed: str | Path | None = None) -> Path:
    """Return the folder of this run on rank 0; see :func:`run_folder`."""
    if trainer in _spawned:
        return _spawned[trainer]
    if trainer.loggers:
        return folder_of(trainer.loggers[0], trainer.default_root_dir)
    if trainer not in _folders:
        _folders[trainer] = _without_logger(trainer, resumed or trainer.ckpt_path)
    return _folders[trainer]


def set_spawned_folder(trainer: L.Trainer, folder: Path) -> None:
    """Set the folder of a run that processes of ``ddp_spawn`` or ``ddp_fork`` have written."""
    _spawned[trainer] = folder


def check_local(trainer: L.Trainer) -> None:
    """Raise a UserError if the folder of this run is not local; ``fast_dev_run`` writes nothing."""
    if not trainer.fast_dev_run:  # type: ignore[attr-defined]
        root = trainer.default_root_dir
        local_path(folder_of(trainer.loggers[0], root) if trainer.loggers else root)


def _without_logger(trainer: L.Trainer, resumed: str | Path | None) -> Path:
    runs = Path(trainer.default_root_dir, WITHOUT_LOGGER)
    if trainer.state.fn == "fit" and resumed is not None and Path(resumed).parent.name == CHECKPOINTS:
        run = Path(resumed).parent.parent
        if run.parent.resolve() == runs.resolve():
            return run
    number = max((version_number(path) for path in runs.glob("version_*")), default=-1) + 1
    while not trainer.fast_dev_run:  # type: ignore[attr-defined]
        try:
            (runs / f"version_{number}").mkdir(parents=True)
            break
        except OSError as error:
            if not (runs / f"version_{number}").is_dir():
                raise cannot_write(runs, error) from error
            number += 1  # another run has just created this one
    return runs / f"version_{number}"


def version_number(run: Path) -> int:
    """Return N for a folder ``version_N``, −1 for other names."""
    number = run.name.removeprefix("version_")
    return int(number) if run.name.startswith("version_") and number.isdecimal() else -1


def create_logger_folders(trainer: L.Trainer) -> None:
    """Create the folders of TensorBoard's and CSV loggers on rank 0, or raise an error before training."""
    for logger in trainer.loggers if trainer.is_global_zero else ():
        if logger_kind(logger) not in ("TensorBoardLogger", "CSVLogger"):
            continue
        folder = local_path(folder_of(logger, trainer.default_root_dir))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(13, "Permission denied", str(folder))
        except OSError as error:
            raise CannotWriteError(
                error.errno,
                f"cannot write {error.filename or folder}: {error.strerror}; choose another folder (the logger's "
                "save_dir, or trainer.default_root_dir)",
            ) from error


def free_name(stem: str, is_taken: Callable[[str], bool]) -> str:
    """Return the first of ``stem``, ``stem-v1``, ``stem-v2``, … that is not taken."""
    name, number = stem, 0
    while is_taken(name):
        number += 1
        name = f"{stem}-v{number}"
    return name


def saved_step(path: Path) -> int:
    """Return the training step of a checkpoint; ValueError if it cannot be read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    except Exception as error:  # torch and pickle raise many types for damaged files
        raise UserError(f"{path} is not a readable checkpoint: remove it to resume from another one") from error


def is_behind(path: Path, step: int) -> bool:
    """Return True if a checkpoint can be read and its step is at most ``step``."""
    try:
        return saved_step(path) <= step
    except UserError:
        return False


def newest_checkpoint_in(run: Path) -> tuple[int, Path] | None:
    """Return step and path of the newest checkpoint in a run's folder, None without any.

    The newest checkpoint has the highest step; where several runs have saved to one folder, it is the ``last*.ckpt``
    that was saved last.
    """
    saved = checkpoints_in(run)
    last = [path for path in saved if path.name.startswith("last")]
    return max(((saved_step(path), path) for path in (last[-1:] if len(last) > 1 else saved)), default=None)


def checkpoints_in(run: Path) -> list[Path]:
    """Return the checkpoints in a run's folder, the newest last; an empty file is not a checkpoint yet."""
    saved = [path for path in (run / CHECKPOINTS).glob("[!.]*.ckpt") if path.stat().st_size]
    return sorted(saved, key=lambda path: path.stat().st_mtime_ns)
