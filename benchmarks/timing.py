"""Timers, memory, ratios and options of the benchmarks."""

from __future__ import annotations

import argparse
import logging
import platform
import re
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch


class Stopwatch(L.Callback):
    """Seconds of training without set-up.

    Args:
        skip: number of first steps to exclude, in which workers start and kernels are tuned.

    """

    def __init__(self, skip: int = 0) -> None:
        self.skip = skip

    def on_train_start(self, *_: object) -> None:
        """Start the timer."""
        self._start = _now()

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        """Restart the timer after the excluded steps."""
        if trainer.global_step == self.skip:
            self._start = _now()

    def on_train_end(self, *_: object) -> None:
        """Stop before other callbacks write their results."""
        self.seconds = _now() - self._start


def quiet_lightning() -> None:
    """Silence the start-up messages of Lightning."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def argument_parser(description: str | None, rounds: int | None = None) -> argparse.ArgumentParser:
    """Return a parser with the description of a benchmark and, given its default, the option ``--rounds``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help=f"timed rounds (default: {rounds})")
    return parser


def machine() -> str:
    """Return processor, number of threads and torch version."""
    return f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def processor_seconds(call: Callable[[], Any]) -> float:
    """Return the processor time of one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def alternate(timed: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each competitor in each round, without a warm-up round.

    Every second round runs in reverse order, because a competitor can affect the next one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for index in range(rounds + 1):
        for name in list(timed)[:: -1 if index % 2 else 1]:
            seconds[name].append(timed[name]())
    return {name: values[1:] for name, values in seconds.items()}


def ratio(one: list[float], other: list[float]) -> float:
    """Return the median over rounds of one / other, which cancels drift of the machine."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def reset_peak_bytes() -> int:
    """Reset the peak of resident memory and return it (man 5 proc, clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    """Return this process's peak of resident memory since the last reset."""
    peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    if peak is None:
        raise RuntimeError("no peak memory (VmHWM) in /proc/self/status: run this benchmark on Linux")
    return int(peak[1]) * 1024


def check(name: str, ratio: float, limit: float | None = None, minimum: bool = False) -> bool:
    """Print a ratio with its limit, a maximum or a ``minimum``, and return whether it meets it."""
    ok = limit is None or (ratio >= limit if minimum else ratio <= limit)
    bound = "" if limit is None else f"  ({'at least' if minimum else 'limit'} {limit})"
    print(f"  {name}: {ratio:.3g}{bound}{'' if ok else '  MISSED'}", flush=True)
    return ok


def check_all(ratios: Mapping[str, tuple[float, float]]) -> bool:
    """Print ratios with their maximum and return whether all meet it."""
    return all([check(name, value, limit) for name, (value, limit) in ratios.items()])
