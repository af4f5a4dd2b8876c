"""Atomic writes: a kill at any moment leaves the old file or the new one, never a part of one."""

from __future__ import annotations

import errno
import glob
import os
import re
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from stepwise_lightning.errors import UserError, cannot_write

# Errors of file systems that do not implement fsync, such as some versions of CIFS, VirtualBox and FUSE.
_NO_FSYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM)
# The scheme of an address, also of one that Path has normalised to s3:/bucket; a drive of Windows has one letter.
_ADDRESS = re.compile(r"([A-Za-z][\w+.-]*[\w:+.-]:)/+")
# A temporary file that has not changed for so many seconds was left by a killed process.
_ABANDONED = 3600


def atomic_write(path: Path, write: Callable[[Path], Any]) -> None:
    """Call ``write`` with a temporary path in the same folder, sync that file, and rename it to ``path``.

    The temporary file is hidden and has the suffix of ``path``, from which writers infer the format. Its name is
    unique, because several processes may write ``path`` at once. It is removed if ``write`` raises; a kill may leave
    it, and a call at least an hour later removes it. A missing folder is created.

    Raises:
        CannotWriteError: the file cannot be written; ``path`` is unchanged.
        UserError: ``path`` is an address such as ``s3://…``.

    """
    local_path(path)
    partial = path.with_name(f".{path.stem}.partial-{uuid.uuid4().hex[:12]}{path.suffix}")
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
    _remove_abandoned(path)


def atomic_write_stream(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """Call ``write`` with a stream, and write a file atomically; ``numpy.savez`` would append ``.npz`` to a name."""

    def write_stream(partial: Path) -> None:
        with partial.open("wb") as stream:
            write(stream)

    atomic_write(Path(path), write_stream)


def atomic_write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    atomic_write(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def local_path(path: str | os.PathLike[str]) -> Path:
    """Return a path of the local file system.

    Raises:
        UserError: an address, such as ``s3://bucket/runs`` or ``file:///runs``; Path would make it a folder ``s3:``.

    """
    if match := _ADDRESS.match(str(path)):
        slashes = "///" if match[1] == "file:" else "//"
        raise UserError(
            f"{match[1]}{slashes}{str(path)[match.end() :]} is an address, not a path: files are written to local "
            "folders only; give a local path (of a run: the logger's save_dir, or default_root_dir), and copy the "
            "files afterwards"
        )
    return Path(path)


def reserve(path: Path) -> bool:
    """Create an empty file; return False if ``path`` exists, for one of two processes that call this at once.

    Raises:
        CannotWriteError: the file cannot be created.

    """
    local_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(exist_ok=False)
    except OSError as error:
        if isinstance(error, FileExistsError) and path.parent.is_dir():
            return False
        raise cannot_write(path, error) from error
    return True


def _remove_abandoned(path: Path) -> None:
    for partial in path.parent.glob(f".{glob.escape(path.stem)}.partial-*{glob.escape(path.suffix)}"):
        with suppress(OSError):  # another process may remove it first
            if time.time() - partial.stat().st_mtime > _ABANDONED:
                partial.unlink()


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
