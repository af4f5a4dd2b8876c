"""Processes that begin at once: forked from one that has imported everything, and computes nothing itself.

Importing torch and Lightning takes longer than a small experiment. What is forked has nothing of other experiments in
it: memory, random numbers, threads and signals are those of a process that was started anew.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from multiprocessing import connection, forkserver, parent_process, reduction, resource_tracker
from multiprocessing.context import ForkServerContext
from threading import Lock, Thread
from typing import IO, Any

# Whatever an experiment or a training run imports sooner or later.
_IMPORTS = ["stepwise_lightning.commands.lightning_cli", "torch.utils.tensorboard", "skimage.data", "reproduce.figures"]
_one_at_a_time = Lock()


def warm_context() -> ForkServerContext:
    """Return what starts such processes; they compute in one thread, and SIGINT does not reach them.

    The process that they are forked from ends with this one.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTS if sys.platform == "linux" else [])  # those of macOS do not survive a fork
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read when NumPy and torch are imported
    resource_tracker.ensure_running()  # would let SIGINT through again
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # inherited; Ctrl-C must not end its imports
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        del os.environ["OMP_NUM_THREADS"]
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = threads
    return context


def warm_up() -> None:
    """Wait until such processes can begin at once."""
    process = warm_context().Process(target=int)
    process.start()
    process.join()


class WarmProcess:
    """``python -m MODULE ARGUMENTS``, begun at once, with the manners of :class:`subprocess.Popen`.

    When this process ends, however that is, it gets SIGTERM.

    Args:
        module: as after ``python -m``.
        arguments: of its command line.
        output: a file that takes what it prints.
        pass_fds: file descriptors that it holds until it ends.

    """

    def __init__(self, module: str, arguments: Sequence[str], output: IO[str], pass_fds: Sequence[int] = ()) -> None:
        held = [_Descriptor(number) for number in (output.fileno(), *pass_fds)]
        with _one_at_a_time:
            self._process = warm_context().Process(target=_run, args=(module, list(arguments), *held))
            self._process.start()

    def wait(self) -> int:
        """Return its exit status, −n if signal n has ended it."""
        connection.wait([self._process.sentinel])
        with _one_at_a_time:  # starting another one looks for those that have ended, and would take its status
            self._process.join()
            status = self._process.exitcode
        assert status is not None
        return status

    def terminate(self) -> None:
        """Send it SIGTERM."""
        self._process.terminate()


class _Descriptor:
    """A file descriptor that is sent to a process when that is started, and is a number there."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (reduction.DupFd(self.number),)


def _received(descriptor: Any) -> int:
    return descriptor.detach()


def _run(module: str, arguments: list[str], output: int, *held: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        os.dup2(output, stream.fileno())
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    Thread(target=_stop_with_parent, daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    multiprocessing.set_start_method(None, force=True)  # of its own children
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _stop_with_parent() -> None:
    if (parent := parent_process()) is not None:
        parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
