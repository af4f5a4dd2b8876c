"""Read what a run has written. Files are data: nothing in them is imported or run, and damage is named in one line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np


def load_spectra(path: str | Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return what a ``SpectrumLogger`` has measured: ``step``, ``time``, ``loss``, eigenvalues and measures.

    Args:
        path: a ``spectrum.npz``, or the folder of the run that holds it.

    Returns:
        All arrays of the file, by the names that :class:`stepwise_lightning.SpectrumLogger` lists; the first dimension
        of each is T, the number of measurements.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or something else.

    """
    file = Path(path, "spectrum.npz") if os.path.isdir(path) else Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"no {str(file)!r}: give a spectrum.npz, or the folder of a run whose training has ended"
        )
    try:
        # Opened here: NumPy leaves a damaged zip file open.
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as saved:
            spectra = {name: np.asanyarray(saved[name]) for name in saved}  # of a damaged name it gives bytes
    except Exception as error:  # NumPy, zipfile and zlib raise whatever they come across
        raise ValueError(f"{str(file)!r} cannot be read as spectra ({reason(error)}): train the run again") from error
    lengths = {len(values) if values.ndim else None for values in spectra.values()}
    numbers = all(values.dtype.kind in "iuf" for values in spectra.values())
    if not ({"step", "time", "loss"} <= spectra.keys() and numbers and len(lengths) == 1 and None not in lengths):
        raise ValueError(f"{str(file)!r} holds no spectra: expected step, time, loss and eigenvalues of equal length")
    return spectra


def reason(error: Exception) -> str:
    """Return the kind and text of an error in one line, at most 300 characters."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    return text if len(text) < 300 else text[:300] + "…"
