"""Provenance of a result: versions, commits, machine, date."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def provenance() -> dict[str, Any]:
    """Return versions, commits, machine and date of this run; a GPU only if this process uses it.

    ``commit`` is the commit of this package, None for an installed copy, whose files no repository tracks.
    ``working_directory_commit`` is the commit of the repository that contains the working directory, None outside of
    a repository.
    """
    packages = ("stepwise_lightning", "torch", "lightning", "torchvision", "scikit-image", "numpy")
    tracked = _git(Path(__file__).parent, "ls-files", "--error-unmatch", Path(__file__).name) is not None
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "commit": _commit(Path(__file__).parent) if tracked else None,
        "working_directory_commit": _commit(Path.cwd()),
        "machine": {
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_initialized() else None,
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _commit(folder: Path) -> str | None:
    commit = _git(folder, "rev-parse", "HEAD")
    # Stored results are not code; python -m reproduce confirm writes them one after the other.
    changed = _git(folder, "status", "--porcelain", "--", ":/", ":(top,exclude)reproduce/results")
    if not commit:
        return None
    return commit + (" (with uncommitted changes)" if changed else "")


def _git(folder: Path, *arguments: str) -> str | None:
    """Return the output of git, None if it fails or is not installed."""
    # Hooks of git set variables that name another repository.
    environment = {name: value for name, value in os.environ.items() if name not in ("GIT_DIR", "GIT_WORK_TREE")}
    command = ["git", "-C", str(folder), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
