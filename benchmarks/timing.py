"""What the benchmarks share."""

from __future__ import annotations

import time

import lightning as L


class Stopwatch(L.Callback):
    """Seconds from the first to the last training step, set-up left out."""

    def on_train_start(self, *_: object) -> None:
        """Start."""
        self._start = time.perf_counter()

    def on_train_end(self, *_: object) -> None:
        """Stop, before other callbacks write their results."""
        self.seconds = time.perf_counter() - self._start


def within(name: str, ratio: float, limit: float | None = None, least: bool = False) -> bool:
    """Print a ratio and whether it keeps its limit: at most that, or at least with ``least``; None for no limit."""
    ok = limit is None or (ratio >= limit if least else ratio <= limit)
    bound = "" if limit is None else f"  ({'at least' if least else 'limit'} {limit})"
    print(f"  {name}: {ratio:.3g}{bound}{'' if ok else '  MISSED'}", flush=True)
    return ok
