"""Where the loggers of a Trainer write: one folder for each run, and TensorBoard's writers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import lightning as L

from stepwise_lightning.errors import cannot_write

__all__ = ["CHECKPOINTS", "WITHOUT_LOGGER", "board_of", "boards", "folder_of", "free_name", "run_folder"]

CHECKPOINTS = "checkpoints"  # the folder of a run that holds them
WITHOUT_LOGGER = "stepwise_runs"  # in the Trainer's default_root_dir, where there is no logger

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


def board_of(logger: Any) -> Any:
    """Return a logger's TensorBoard writer, of ``lightning`` or ``pytorch_lightning``, who share no class; or None."""
    writer: Any = getattr(logger, "experiment", None)
    # The log_dir, because the logger of fast_dev_run has a writer that has everything.
    is_board = hasattr(writer, "add_custom_scalars") and isinstance(writer.log_dir, (str, os.PathLike))
    return writer if is_board else None


def boards(trainer: L.Trainer) -> list[Any]:
    """Return the TensorBoard writers of a Trainer's loggers."""
    return [board for board in map(board_of, trainer.loggers) if board is not None]
