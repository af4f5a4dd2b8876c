"""Files that are never half-written: each is the old one or the new one, whenever the process is killed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What a disk says that takes no more: full, over a user's quota, or a file over its limit.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` write a file beside ``path``, and move it there when all of it is on the disk.

    The file beside it is hidden, and has the same ending, which tells writers the format. It is removed if ``write``
    fails; after a kill it may stay, and the next call overwrites it.

    Raises:
        OSError: it cannot be written; ``path`` is as it was.

    """
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        write(partial)
        _sync(partial)  # or a crash of the machine could leave the new name with nothing in it
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise cannot_write(path, error) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def replace_text(path: Path, text: str) -> None:
    """Replace a text file, UTF-8, in the same way."""
    replace(path, lambda partial: partial.write_text(text, encoding="utf-8"))


class CannotWriteError(OSError):
    """A file cannot be written; what it says is one line."""

    def __str__(self) -> str:
        return str(self.strerror)


def cannot_write(path: str | Path, error: OSError) -> CannotWriteError:
    """Return the error to raise when ``path`` cannot be written."""
    remedy = "; free some space" if error.errno in _FULL else ""
    text = f"cannot write {path}: {error.strerror or error}; what was saved before is kept{remedy}"
    return CannotWriteError(error.errno, text)


def full_disk(error: BaseException | None) -> CannotWriteError | None:
    """Return the word of a full disk among an error and what it came from, the clearest one, or None."""
    found = None
    while error is not None:
        if isinstance(error, CannotWriteError) and error.errno in _FULL:
            return error
        if isinstance(error, OSError) and error.errno in _FULL:
            found = cannot_write(error.filename or "a file of this run", error)
        error = error.__cause__ or error.__context__
    return found


def _sync(path: Path) -> None:
    if os.name != "posix":  # Windows can sync neither a folder nor a file opened for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
