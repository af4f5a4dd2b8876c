"""Parallel experiments, forked training processes and progress output.

Importing torch and Lightning takes longer than a small experiment. Processes are therefore forked from a server that
has imported both and computes nothing: memory, random numbers, threads and signals are as in a fresh interpreter.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import runpy
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import (
    active_children,
    connection,
    forkserver,
    parent_process,
    reduction,
    resource_tracker,
)
from multiprocessing.context import ForkServerContext
from threading import Lock, Thread
from typing import IO, Any, Self

import lightning as L
import torch
from tqdm import tqdm

LINE_INTERVAL = 20.0  # seconds between two lines of progress
_PRELOADED_MODULES = [
    "stepwise_lightning.commands.lightning_cli", "torch.utils.tensorboard", "skimage.data", "reproduce.figures"
]  # fmt: skip
_start_lock = Lock()


class Progress:
    """Show progress: a bar on a terminal, otherwise a plain line every 20 seconds.

    A line reads ``kernel_pca: 3 of 9 runs, 0 min 40 s``.

    Args:
        title: the first part of the line, usually the name of the figure.
        total: number of units of work.
        unit: plural noun of the unit.
        completed: units that were completed earlier.

    """

    def __init__(self, title: str, total: int, unit: str = "runs", completed: int = 0) -> None:
        self._title, self._total, self._unit, self._completed = title, total, unit, completed
        self._start = time.monotonic()
        self._bar: tqdm[Any] | None = None
        if sys.stdout.isatty() and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=completed, desc=title, unit=f" {unit}", leave=False)
        else:
            self._print_line()

    def update(self, count: int = 1) -> None:
        """Count completed units, and print a line if the last one is 20 seconds old."""
        self._completed += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._last_line >= LINE_INTERVAL:
            self._print_line()

    def wait_for(self, futures: Iterable[Future[Any]]) -> None:
        """Wait until all futures are done, count each, and raise the first exception of any."""
        pending = set(futures)
        while pending:
            done, pending = wait(pending, LINE_INTERVAL, FIRST_COMPLETED)
            for future in done:
                future.result()
            self.update(len(done))

    def _print_line(self) -> None:
        self._last_line, self._printed = time.monotonic(), self._completed
        minutes, seconds = divmod(int(self._last_line - self._start), 60)
        print(f"{self._title}: {self._completed} of {self._total} {self._unit}, {minutes} min {seconds} s", flush=True)

    def close(self) -> None:
        """Close the bar, or print the last line."""
        if self._bar is not None:
            self._bar.close()
        elif self._completed != self._printed:
            self._print_line()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _StepProgress(L.Callback):
    """Show the progress of one training run in optimiser steps."""

    def __init__(self, title: str, steps: int) -> None:
        self._arguments = title, steps, "steps"

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._progress = Progress(*self._arguments)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._progress.update()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._progress.close()


def step_progress(title: str, steps: int) -> list[_StepProgress]:
    """Return a progress callback in the main process, and an empty list in a worker process."""
    return [_StepProgress(title, steps)] if is_main_process() else []


def is_main_process() -> bool:
    """Return True unless this process is one of the parallel workers, which share one progress display."""
    return parent_process() is None


def map_parallel(function: Callable[..., Any], items: Sequence[tuple[Any, ...]], title: str) -> list[Any]:
    """Return ``[function(*item) for item in items]``, computed in one process per core.

    Function, items and results must be picklable. A single item is computed in this process, which shows its own
    progress.
    """
    if len(items) == 1:
        return [function(*items[0])]
    with Progress(title, len(items)) as progress:
        if os.cpu_count() == 1:
            results = []
            for item in items:
                results.append(function(*item))
                progress.update()
            return results
        with ProcessPoolExecutor(min(len(items), os.cpu_count() or 1), forkserver_context(), _start_worker) as pool:
            futures = [pool.submit(_pickled, function, item) for item in items]
            try:
                progress.wait_for(futures)
            except BaseException:
                for process in active_children():  # the pool would wait for their current items
                    process.terminate()
                pool.shutdown(cancel_futures=True)
                raise
            return [pickle.loads(future.result()) for future in futures]


def _pickled(function: Callable[..., Any], item: tuple[Any, ...]) -> bytes:
    # Bytes: torch shares tensors between processes as open files, hundreds for one record.
    return pickle.dumps(function(*item))


def _start_worker() -> None:
    prepare_process()
    # A worker whose main process is killed would wait for work forever.
    Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    if (parent := parent_process()) is not None:
        parent.join()
    os._exit(1)


def prepare_process() -> None:
    """Silence start-up messages of Lightning and use one thread.

    These experiments are small: parallel runs use the cores better than threads.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    torch.set_num_threads(1)


def forkserver_context() -> ForkServerContext:
    """Return a context whose processes use one thread and do not receive SIGINT.

    The server from which they are forked ends with this process.
    """
    context = multiprocessing.get_context("forkserver")
    # On macOS the imported libraries do not survive a fork.
    context.set_forkserver_preload(_PRELOADED_MODULES if sys.platform == "linux" else [])
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read when NumPy and torch are imported
    resource_tracker.ensure_running()  # starting it later would unblock SIGINT
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # inherited: Ctrl-C must not end the imports
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        del os.environ["OMP_NUM_THREADS"]
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = threads
    return context


def start_forkserver() -> None:
    """Wait until the server has imported its modules."""
    process = forkserver_context().Process(target=int)
    process.start()
    process.join()


class ForkedProcess:
    """Run ``python -m MODULE ARGUMENTS`` in a forked process, with an interface like :class:`subprocess.Popen`.

    The process receives SIGTERM when its parent ends for any reason.

    Args:
        module: name of the module.
        arguments: command-line arguments.
        output: file for standard output and standard error.
        pass_fds: file descriptors that the process keeps open until it ends.

    """

    def __init__(self, module: str, arguments: Sequence[str], output: IO[str], pass_fds: Sequence[int] = ()) -> None:
        descriptors = [_Descriptor(number) for number in (output.fileno(), *pass_fds)]
        with _start_lock:
            self._process = forkserver_context().Process(
                target=_run_module, args=(module, list(arguments), *descriptors)
            )
            self._process.start()

    def wait(self) -> int:
        """Return the exit status, −n if signal n ended the process."""
        connection.wait([self._process.sentinel])
        with _start_lock:  # starting another process joins finished ones, and would take this status
            self._process.join()
            status = self._process.exitcode
        assert status is not None
        return status

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._process.terminate()


class _Descriptor:
    """A file descriptor that is duplicated into a process when that starts, and is a number there."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _detached, (reduction.DupFd(self.number),)


def _detached(descriptor: Any) -> int:
    return descriptor.detach()


def _run_module(module: str, arguments: list[str], output: int, *descriptors: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        os.dup2(output, stream.fileno())
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    Thread(target=_terminate_with_parent, daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    multiprocessing.set_start_method(None, force=True)  # the default for child processes of the module
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _terminate_with_parent() -> None:
    if (parent := parent_process()) is not None:
        parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
