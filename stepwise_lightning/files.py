"""Files that are never half-written: each is the old one or the new one, whenever the process is killed."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from stepwise_lightning.errors import cannot_write

__all__ = ["atomic_write", "atomic_write_text"]


def atomic_write(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` write a file beside ``path``, and move it there when all of it is on the disk.

    The file beside it is hidden, and has the same ending, which tells writers the format. It is removed if ``write``
    fails; after a kill it may stay, and the next call overwrites it. A missing folder is made.

    Raises:
        CannotWriteError: it cannot be written (an OSError too); ``path`` is as it was.

    """
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        _sync(partial)  # or a crash of the machine could leave the new name with nothing in it
        os.replace(partial, path)
    except OSError as error:
        _remove(partial)
        raise cannot_write(path, error) from error
    except BaseException:
        _remove(partial)
        raise
    _sync(path.parent)


def atomic_write_text(path: Path, text: str) -> None:
    """Replace a text file, UTF-8, in the same way."""
    atomic_write(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def _remove(partial: Path) -> None:
    with suppress(OSError):  # its folder may not be one
        partial.unlink()


def _sync(path: Path) -> None:
    if os.name != "posix":  # Windows can sync neither a folder nor a file opened for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
