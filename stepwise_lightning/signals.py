"""How a run is told to stop, and how it says that it has."""

from __future__ import annotations

import signal

__all__ = ["EX_TEMPFAIL", "INTERRUPTED", "STOP_SIGNALS"]

# The exit status of a run that was told to stop, has saved itself, and can be continued: sysexits.h's "try again".
EX_TEMPFAIL = 75
# Ctrl-C, and what schedulers send; Windows lacks the last one.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
# The exit status after Ctrl-C, as shells say it.
INTERRUPTED = 128 + signal.SIGINT
