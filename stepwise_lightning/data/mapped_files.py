"""Files as one array, mapped into memory: the processes of a machine share one copy of what they read."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

__all__ = ["mapped_bytes"]

_MAP_FIXED = 0x10  # of Linux and macOS; Python's mmap, which lacks it, can map only one file at a time


def mapped_bytes(paths: Sequence[Path]) -> np.ndarray:
    """Return the bytes of files, one after the other, as uint8, (bytes,).

    They are read when they are looked at, and lie in memory once, whichever processes look; what is written to the
    array stays in it. Memory is mapped in pages: a file that does not begin where a page does, because the one before
    it ends within one, is read at once, for this process alone. So is the first, if the second one could not be mapped
    otherwise. The files must not be changed while the array is in use.

    Raises:
        OSError: one of them cannot be read.

    """
    sizes = [path.stat().st_size for path in paths]
    start = position = -sizes[0] % mmap.PAGESIZE  # the second file is to begin with a page
    memory = mmap.mmap(-1, max(1, start + sum(sizes)), access=mmap.ACCESS_COPY)
    whole = np.frombuffer(memory, np.uint8)
    for path, size in zip(paths, sizes, strict=True):
        part = whole[position : position + size]
        with path.open("rb") as file:
            is_mapped = not position % mmap.PAGESIZE and _map_into(part, file.fileno())
            if not is_mapped and file.readinto(part.data) != size:
                raise OSError(f"{path} has become shorter while it was read")
        position += size
    return whole[start:position]


def _map_into(part: np.ndarray, descriptor: int) -> bool:
    """Put a file in the place of the memory of ``part``, which begins with a page; return whether that was possible."""
    if os.name != "posix" or not part.size:
        return False
    place = ctypes.CDLL(None).mmap
    place.restype = ctypes.c_void_p
    place.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_ssize_t]
    # Writable, or torch would warn of it; private, so that the file is not written to.
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_FIXED
    return place(part.ctypes.data, part.nbytes, protection, flags, descriptor, 0) == part.ctypes.data
