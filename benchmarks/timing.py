"""What the benchmarks share."""

from __future__ import annotations

import logging
import re
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import lightning as L
import torch


class Stopwatch(L.Callback):
    """Seconds from the first to the last training step, set-up left out.

    Args:
        skip: leave out so many steps too, in which workers start and kernels are chosen.

    """

    def __init__(self, skip: int = 0) -> None:
        self.skip = skip

    def on_train_start(self, *_: object) -> None:
        """Start."""
        self._start = _now()

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        """Start anew after the steps that do not count."""
        if trainer.global_step == self.skip:
            self._start = _now()

    def on_train_end(self, *_: object) -> None:
        """Stop, before other callbacks write their results."""
        self.seconds = _now() - self._start


def quiet_lightning() -> None:
    """Silence start-up messages that are not about what is measured."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def alternate(timed: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each competitor in each round; a first round to warm up does not count.

    Every other round is run backwards, so that none always follows the same other.
    """
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for index in range(rounds + 1):
        for name in list(timed)[:: -1 if index % 2 else 1]:
            seconds[name].append(timed[name]())
    return {name: values[1:] for name, values in seconds.items()}


def ratio(one: list[float], other: list[float]) -> float:
    """Return the median over the rounds of one / other, so that drift of the machine cancels."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def fresh_peak_bytes() -> int:
    """Forget the peak so far, which may be higher than that of what is measured (man 5 proc, clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    """Return this process's peak of resident memory since it was last forgotten."""
    peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    if peak is None:
        raise RuntimeError("/proc/self/status states no peak memory (VmHWM): this benchmark needs Linux")
    return int(peak[1]) * 1024


def within(name: str, ratio: float, limit: float | None = None, least: bool = False) -> bool:
    """Print a ratio and whether it keeps its limit: at most that, or at least with ``least``; None for no limit."""
    ok = limit is None or (ratio >= limit if least else ratio <= limit)
    bound = "" if limit is None else f"  ({'at least' if least else 'limit'} {limit})"
    print(f"  {name}: {ratio:.3g}{bound}{'' if ok else '  MISSED'}", flush=True)
    return ok
