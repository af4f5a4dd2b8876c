"""Signals that stop a run, and its exit statuses."""

from __future__ import annotations

import signal

__all__ = ["EX_TEMPFAIL", "INTERRUPTED", "STOP_SIGNALS"]

# Exit status of a run that a signal stopped after it saved a checkpoint: "temporary failure" in sysexits.h.
EX_TEMPFAIL = 75
# Ctrl-C, and the signals of schedulers; Windows has no SIGUSR1.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
# Exit status after Ctrl-C, as shells report it.
INTERRUPTED = 128 + signal.SIGINT
