"""Atomic writes: a kill at any moment leaves the old file or the new one, never a part of one."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from stepwise_lightning.errors import cannot_write

__all__ = ["atomic_write", "atomic_write_text"]

# Errors of file systems that do not implement fsync, such as some versions of CIFS, VirtualBox and FUSE.
_NO_FSYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM)


def atomic_write(path: Path, write: Callable[[Path], Any]) -> None:
    """Call ``write`` with a temporary path in the same folder, sync that file, and rename it to ``path``.

    The temporary file is hidden and has the suffix of ``path``, from which writers infer the format. It is removed if
    ``write`` raises; a kill may leave it, and the next call overwrites it. A missing folder is created.

    Raises:
        CannotWriteError: the file cannot be written; ``path`` is unchanged.

    """
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        _sync(partial)  # otherwise a crash of the machine could leave the new name on an empty file
        os.replace(partial, path)
    except OSError as error:
        _remove(partial)
        raise cannot_write(path, error) from error
    except BaseException:
        _remove(partial)
        raise
    with suppress(OSError):  # the file is complete; only a crash of the machine could still undo its renaming
        _sync(path.parent)


def atomic_write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    atomic_write(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def _remove(partial: Path) -> None:
    with suppress(OSError):  # the parent may not be a folder
        partial.unlink()


def _sync(path: Path) -> None:
    if os.name != "posix":  # Windows can sync neither a folder nor a file opened for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise
    finally:
        os.close(descriptor)
