"""Errors that are reported in one line, without a traceback.

The package raises :class:`UserError` for everything that a user can correct. :func:`one_line` also recognises errors of
other libraries by their type, errno and message. Every other exception is a bug and keeps its traceback.

Also warnings of deprecated names, the signals that stop a run, and its exit statuses.
"""

from __future__ import annotations

import errno
import os
import pickle
import re
import signal
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

# Exit status of a run that a signal stopped after it saved a checkpoint: "temporary failure" in sysexits.h.
EX_TEMPFAIL = 75
# Ctrl-C, and the signals of schedulers; Windows has no SIGUSR1.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
# Exit status after Ctrl-C, as shells report it.
INTERRUPTED = 128 + signal.SIGINT
# The disk is full, the user's quota is used up, or the file exceeds its size limit.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Messages of torch.distributed back-ends: another process has ended.
_PEER_LOST = re.compile(
    r"Connection (closed|reset) by|Broken pipe|Timed out (waiting|after)|(Application|Socket|Read|Write) timeout|"
    r"Socket (unexpectedly )?closed|failed to (send|recv)|NCCL.*(timeout|remote process exited)",
    re.IGNORECASE,
)
# Another program uses the port of the process group; no process listens on it.
_PORT_TAKEN = re.compile(r"address already in use|EADDRINUSE", re.IGNORECASE)
_NO_LISTENER = re.compile(
    r"client socket has (failed|timed out)|connection was refused|network addresses of .* cannot be retrieved",
    re.IGNORECASE,
)
# Messages of torch and Lightning: the checkpoint does not fit the module, its optimizers or its schedulers.
_NOT_RESTORED = re.compile(r"Error\(s\) in loading state_dict|loaded state dict (contains|has)|Trying to restore ")
# Messages of torch's DataLoader: shared memory is full; a worker has ended, or does not answer.
_SHARED_MEMORY = re.compile(
    r"unable to (allocate|open|mmap|resize|write).*(shared memory|</torch_)|Bus error|out of shared memory|"
    rf"DataLoader worker .* exited unexpectedly with exit code {errno.ENOSPC}\b",
    re.DOTALL,
)
_WORKER_LOST = re.compile(
    r"DataLoader worker \(pid.*?\) (is killed by signal|exited unexpectedly)|DataLoader timed out"
)
SHARED_MEMORY = (
    "shared memory (/dev/shm) is full, and data workers cannot send batches: use --data.num_workers 0, or give the "
    "container more of it (docker run --shm-size 4g)"
)
# jsonargparse could not instantiate a class; a line of its message is the reason.
_NOT_INSTANTIATED = "Does not validate against any of the Union subtypes"
# Messages of Lightning for arguments that it can check only once it has the data.
_LIGHTNING_ARGUMENT = re.compile(r"`(val_check_interval|limit_\w+_batches|\w*dataloader\w*|Trainer\(.*\))`")


class UserError(ValueError):
    """An error that the user can correct; its message names the value, the valid values and the remedy in one line."""


class NotFoundError(FileNotFoundError, UserError):
    """A file, folder or data set does not exist."""


class CannotReadError(OSError, UserError):
    """A file or folder may not be read."""


class CannotWriteError(OSError, UserError):
    """A file cannot be written."""

    def __str__(self) -> str:
        return str(self.strerror or self.args[0])


class DivergedError(FloatingPointError, UserError):
    """The data or the training produced values that are not finite."""


class LostProcessError(UserError, SystemExit):
    """Another process of this run has ended. Uncaught, it ends the program with its message and exit status 1."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.code = text


def cannot_write(path: str | Path, error: OSError) -> CannotWriteError:
    """Return the error to raise when ``path`` cannot be written."""
    remedy = "; free some space" if error.errno in _FULL else ""
    text = f"cannot write {path}: {error.strerror or error}; what was saved before is kept{remedy}"
    return CannotWriteError(error.errno, text)


def full_disk(error: BaseException | None) -> CannotWriteError | None:
    """Return the clearest error about a full disk in a chain of exceptions, None if there is no such error."""
    unclear = None
    while error is not None:
        if isinstance(error, CannotWriteError) and error.errno in _FULL:
            return error
        if isinstance(error, OSError) and error.errno in _FULL:
            unclear = cannot_write(error.filename or "a file of this run", error)
        error = error.__cause__ or error.__context__
    return unclear


def lost_process(error: RuntimeError) -> LostProcessError | None:
    """Return the error to raise if a back-end reports that another process has ended, None for other errors."""
    if not _PEER_LOST.search(str(error)) or _lost_worker(error):
        return None
    # without the source line of gloo, and without its advice
    message = re.sub(r"^\[[^]]*\.cc:\d+\] ", "", str(error).strip().splitlines()[0]).partition(". ")[0]
    return LostProcessError(
        f"another process of this run has ended or does not answer: read its output, and start again ({message})"
    )


def warn_deprecated(name: str, alternative: str, removed_in: str) -> None:
    """Warn with a ``FutureWarning`` at the caller of the function that calls this one; see ``docs/deprecation.md``."""
    message = f"{name} is deprecated and will be removed in version {removed_in}: use {alternative}"
    warnings.warn(message, FutureWarning, stacklevel=3)


def reason(error: Exception) -> str:
    """Return the type, unless it is ours, and message of an error in one line of at most 300 characters."""
    if isinstance(error, pickle.UnpicklingError):
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        return "it contains more than tensors and plain values" + (f", namely {forbidden[1]}" if forbidden else "")
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    text = f"{kind}{' '.join(str(error).split())}".removesuffix(": ")
    return text if len(text) < 300 else text[:300] + "…"


def one_line(error: Exception) -> str | None:
    """Return the message to print in place of a traceback, None for a bug, which needs the traceback."""
    text = str(error).strip()
    if full := full_disk(error):
        return str(full)
    if (lost := _lost_worker(error)) is not None:
        return lost
    if (distributed := _distributed_failure(error)) is not None:
        return distributed
    if isinstance(error, UserError):
        if re.match(r"Caught \w+ in DataLoader worker", text):  # torch raises it again, with the worker's traceback
            text = text.splitlines()[-1].partition(": ")[2]
        return " ".join(text.split())
    if isinstance(error, (RuntimeError, ValueError, KeyError)) and _NOT_RESTORED.match(text.lstrip("'\"")):
        return f"the checkpoint cannot be restored ({reason(error)}): is it of another model?"
    # by name, because importing Lightning takes seconds
    refused = type(error).__name__ == "MisconfigurationException"
    refused = refused or isinstance(error, ValueError) and text.startswith(_NOT_INSTANTIATED)
    if refused or isinstance(error, (ValueError, TypeError)) and _LIGHTNING_ARGUMENT.search(text):
        return condensed(text)
    return None


def _lost_worker(error: BaseException | None) -> str | None:
    """Return one line for data workers that have ended or cannot send batches, None for other errors."""
    text = None
    while error is not None:  # the cause has the signal or exit status
        if isinstance(error, RuntimeError) and _SHARED_MEMORY.search(str(error)):
            return SHARED_MEMORY
        if isinstance(error, RuntimeError) and _WORKER_LOST.search(str(error)):
            text = str(error).strip().splitlines()[0].partition(". ")[0]
        error = error.__cause__ or error.__context__
    return text and (
        f"a data worker was killed or does not answer ({text.rstrip('.')}), which happens if memory or shared memory "
        "(/dev/shm) is full: use fewer workers, or --data.num_workers 0; --ckpt_path last resumes the last checkpoint"
    )


def _distributed_failure(error: Exception) -> str | None:
    """Return one line for a failure of the process group, None for other errors."""
    text = str(error).strip()
    if type(error).__module__.startswith("torch.distributed"):
        address, port = (os.environ.get(name, "not set") for name in ("MASTER_ADDR", "MASTER_PORT"))
        place = f"MASTER_ADDR {address}, MASTER_PORT {port}"
        remedy = "set MASTER_PORT (torchrun: --master-port) to a free port, the same for all processes"
        if _PORT_TAKEN.search(text):
            return f"another program uses the port of this run's process group ({place}): {remedy}"
        if _NO_LISTENER.search(text):
            return f"the first process of this run does not listen at its address ({place}): check it, or {remedy}"
    if isinstance(error, RuntimeError) and _PEER_LOST.search(text):
        return (
            "another process of this run has ended or does not answer: read its output; --ckpt_path last resumes the "
            f"last checkpoint ({text.splitlines()[0]})"
        )
    return None


# Lines of a parser's message that do not help to find the mistake.
_NOISE = re.compile(
    r"^(?:- )*(Does not validate against|Errors:|Expected a <class 'NoneType'>|Expected a path but|"
    r"Subtypes:|Subclass types expect one of|a class path \(str\)|a dict with|Given value|"
    r"Problem with given class_path .*:$|$)"
)


def condensed(message: str) -> str:
    """Condense a message of jsonargparse to one line with the value and the expected type."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    text = ": ".join(line.rstrip(":") for line in lines if not _NOISE.match(line))
    text = re.sub(r"(?<=[^\"]): Not a valid subclass of \w+\.?", "", text)  # the reason stands before it
    text = re.sub(r"Type [\w.]*Callable\[.*?\] expects", "expects", text)
    return re.sub(r'(": Not a valid subclass of \w+)', r"\1 (class_path and, if any, init_args)", text, count=1)


def optional_import(name: str) -> Any:
    """Import a module of a package that is not required; UserError if it is not installed."""
    try:
        return import_module(name)
    except ModuleNotFoundError:
        package = name.partition(".")[0]
        raise UserError(f"{package} is not installed: pip install {package}") from None
