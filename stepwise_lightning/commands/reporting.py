"""Printed lines of a command: characters that the output cannot encode, and errors of several processes."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from pathlib import Path

from stepwise_lightning.files import reserve

_launched = False  # whether another program has started this process as one of several


def prepare_output() -> None:
    """Print "?" for characters such as "≈" and "λ" that the encoding of the output lacks, also in other processes."""
    global _launched
    # Later, the first of several processes that Lightning starts has LOCAL_RANK, too.
    _launched = any(name in os.environ for name in ("LOCAL_RANK", "SLURM_PROCID"))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not every replacement of sys.stdout is a text file
            stream.reconfigure(errors="replace")
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
    if not errors:
        os.environ["PYTHONIOENCODING"] = f"{encoding}:replace"


def is_first_report(text: str) -> bool:
    """Return False if another process of this run on this machine has reported the same error."""
    if not (_launched or "LOCAL_RANK" in os.environ):
        return True
    run = (os.getppid() if _launched else os.getpid(), os.environ.get("MASTER_PORT"), text)
    name = hashlib.blake2b(repr(run).encode(), digest_size=12).hexdigest()
    return reserve(Path(tempfile.gettempdir(), f"stepwise-error-{name}"))
