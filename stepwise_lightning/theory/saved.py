"""Reading a fitted kernel model from a file that may be damaged, or something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepwise_lightning.errors import UserError


def read_fitted(path: str | Path) -> dict[str, Tensor]:
    """Return what ``ContrastiveKernelPCA.save`` has written; nothing in the file is run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or something else.

    """
    try:
        fitted = torch.load(path, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch and its unpickler raise whatever they come across
        kind = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{str(path)!r} cannot be read as a saved model ({kind}): fit and save it again") from error
    if not _is_fitted(fitted):
        raise UserError(f"{str(path)!r} does not hold a fitted ContrastiveKernelPCA: fit and save it again")
    return fitted


def _is_fitted(saved: Any) -> bool:
    """Whether ``saved`` is what ``ContrastiveKernelPCA.save`` writes."""
    names = ("eigenvalues", "coefficients", "residuals", "views")
    if not isinstance(saved, dict) or not all(isinstance(saved.get(name), Tensor) for name in names):
        return False
    eigenvalues, coefficients, residuals, views = (saved[name] for name in names)
    return (
        eigenvalues.ndim == 1
        and len(eigenvalues) > 0
        and eigenvalues.shape == residuals.shape
        and views.ndim > 1
        and len(views) % 2 == 0
        and coefficients.shape == (len(views), len(eigenvalues))
        and all(not saved[name].is_complex() and bool(saved[name].isfinite().all()) for name in names)
        and all(saved[name].dtype == torch.float64 for name in names[:3])
        and bool((eigenvalues > 0).all())
    )
