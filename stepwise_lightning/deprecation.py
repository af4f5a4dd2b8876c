"""Warnings of deprecated names; ``docs/deprecation.md`` states the policy."""

from __future__ import annotations

import warnings


def warn_deprecated(name: str, alternative: str, removed_in: str) -> None:
    """Warn with a ``FutureWarning`` at the caller of the function that calls this one.

    Args:
        name: the deprecated name or option.
        alternative: its replacement.
        removed_in: the first version without it, such as ``"0.4"``.

    """
    message = f"{name} is deprecated and will be removed in version {removed_in}: use {alternative}"
    warnings.warn(message, FutureWarning, stacklevel=3)
