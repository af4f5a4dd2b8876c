"""What is said to the user in one line: our own errors by their class, those of other libraries by what they say.

Everything that this package raises on purpose is a :class:`UserError`. Anything else that comes out of it is a bug, and
keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import pickle
import re
import traceback
from pathlib import Path

__all__ = [
    "CannotReadError",
    "CannotWriteError",
    "DivergedError",
    "LostProcessError",
    "NotFoundError",
    "UserError",
    "cannot_write",
    "condensed",
    "full_disk",
    "lost_process",
    "one_line",
    "reason",
]

# What a disk says that takes no more: full, over a user's quota, or a file over its limit.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# How back-ends of torch.distributed say that another process is gone.
_PEER_LOST = re.compile(
    r"Connection (closed|reset) by|Broken pipe|Timed out (waiting|after)|(Application|Socket|Read|Write) timeout|"
    r"Socket (unexpectedly )?closed|failed to (send|recv)|NCCL.*(timeout|remote process exited)",
    re.IGNORECASE,
)

# How they say that the port where processes are to meet belongs to somebody else, or that nobody is there.
_PORT_TAKEN = re.compile(r"address already in use|EADDRINUSE", re.IGNORECASE)
_NOBODY_MEETS = re.compile(
    r"client socket has (failed|timed out)|connection was refused|network addresses of .* cannot be retrieved",
    re.IGNORECASE,
)
# What a file system says about a folder that cannot be made, or written to.
_NO_FOLDER = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip


class UserError(ValueError):
    """Something that its reader can mend: one line that says what was given, what was expected and what to do."""


class NotFoundError(FileNotFoundError, UserError):
    """A file, folder or data set that is not there."""


class CannotReadError(OSError, UserError):
    """A file or folder that may not be read."""


class CannotWriteError(OSError, UserError):
    """A file that cannot be written."""

    def __str__(self) -> str:
        return str(self.strerror or self.args[0])


class DivergedError(FloatingPointError, UserError):
    """Training, or its data, has produced numbers that are not finite."""


class LostProcessError(UserError, SystemExit):
    """Another process of this run is gone. Uncaught, it ends the program with its line and status 1, no traceback."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.code = text


def cannot_write(path: str | Path, error: OSError) -> CannotWriteError:
    """Return the error to raise when ``path`` cannot be written."""
    remedy = "; free some space" if error.errno in _FULL else ""
    text = f"cannot write {path}: {error.strerror or error}; what was saved before is kept{remedy}"
    return CannotWriteError(error.errno, text)


def full_disk(error: BaseException | None) -> CannotWriteError | None:
    """Return the word of a full disk among an error and what it came from, the clearest one, or None."""
    unclear = None
    while error is not None:
        if isinstance(error, CannotWriteError) and error.errno in _FULL:
            return error
        if isinstance(error, OSError) and error.errno in _FULL:
            unclear = cannot_write(error.filename or "a file of this run", error)
        error = error.__cause__ or error.__context__
    return unclear


def lost_process(error: RuntimeError) -> LostProcessError | None:
    """Return the error to raise when a back-end says that another process is gone; None if it says something else."""
    if not _PEER_LOST.search(str(error)):
        return None
    # without the line of gloo's source, and without its advice
    told = re.sub(r"^\[[^]]*\.cc:\d+\] ", "", str(error).strip().splitlines()[0]).partition(". ")[0]
    return LostProcessError(
        f"another process of this run has ended or does not answer: look at what it wrote, and start all again ({told})"
    )


def reason(error: Exception) -> str:
    """Return the kind and text of an error in one line, at most 300 characters."""
    if isinstance(error, pickle.UnpicklingError):
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        return "it holds more than tensors and plain values" + (f", namely {forbidden[1]}" if forbidden else "")
    text = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    return text if len(text) < 300 else text[:300] + "…"


def one_line(error: Exception) -> str | None:
    """Return what to tell the user in place of a traceback; None for a bug, which needs one.

    One line stands for what this package raises on purpose, a full disk, a folder that Lightning or a logger cannot
    make or write to, a lost process, a port that is taken, and what Lightning and jsonargparse refuse.
    """
    if full := full_disk(error):
        return str(full)
    of_distributed = type(error).__module__.startswith("torch.distributed")
    if of_distributed and _PORT_TAKEN.search(str(error)):
        return f"another program has the port where the processes of this run are to meet{_meeting_point()}"
    if of_distributed and _NOBODY_MEETS.search(str(error)):
        return (
            f"the first process of this run is not where the others are to meet it{_meeting_point()}; look whether it "
            "has started"
        )
    if isinstance(error, RuntimeError) and _PEER_LOST.search(str(error)):
        return (
            "another process of this run has ended or does not answer: look at what it wrote; --ckpt_path last "
            f"continues from the last checkpoint ({str(error).strip().splitlines()[0]})"
        )
    if isinstance(error, UserError):
        text = str(error).strip()
        if re.match(r"Caught \w+ in DataLoader worker", text):  # torch raises it again, with the worker's traceback
            text = text.splitlines()[-1].partition(": ")[2]
        return " ".join(text.split())
    if isinstance(error, OSError) and error.errno in _NO_FOLDER and error.filename and _is_of_a_logger(error):
        return (
            f"cannot write {error.filename}: {error.strerror}; choose another folder (the logger's save_dir, or "
            "trainer.default_root_dir)"
        )
    return _refusal_of_lightning(error)


def _meeting_point() -> str:
    address, port = (os.environ.get(name, "not set") for name in ("MASTER_ADDR", "MASTER_PORT"))
    return (
        f" (MASTER_ADDR {address}, MASTER_PORT {port}): set MASTER_PORT, for torchrun --master-port, to one that is "
        "free, and the same for all processes"
    )


def _is_of_a_logger(error: OSError) -> bool:
    """Return whether Lightning or a logger wanted to write, and not a model, data or a callback."""
    import lightning as L
    from lightning.fabric.loggers.logger import Logger

    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if any(re.match("_?(resume|restore|load)", frame.f_code.co_name) for frame in frames):
        return False  # it wanted to read
    if any(isinstance(frame.f_locals.get("self"), Logger) for frame in frames):
        return True
    libraries = Path(L.__file__).parent.parent, Path(os.__file__).parent
    above = (Path(frame.f_code.co_filename) for frame in reversed(frames))
    caller = next((path for path in above if path.parent != libraries[1] and "fsspec" not in path.parts), None)
    return caller is not None and caller.is_relative_to(libraries[0] / "lightning")


def _refusal_of_lightning(error: Exception) -> str | None:
    """Return one line for what Lightning or jsonargparse raised because of what they were given, None for the rest."""
    import lightning as L
    import torch
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    frames = traceback.extract_tb(error.__traceback__)
    raised_in, lightning = Path(frames[-1].filename), Path(L.__file__).parent
    of_lightning = raised_in.is_relative_to(lightning)
    restoring = any(re.match("_?(resume|restore)", frame.name) for frame in frames if lightning.name in frame.filename)
    of_torch = raised_in.is_relative_to(Path(torch.__file__).parent)
    if restoring and (of_lightning or of_torch) and not isinstance(error, FileNotFoundError):
        return f"the checkpoint cannot be restored ({reason(error)}): is it damaged, or of another model?"
    refused = isinstance(error, (ValueError, TypeError, OSError, MisconfigurationException))
    if (of_lightning or raised_in.parent.name == "jsonargparse") and (refused or raised_in.name == "cli.py"):
        return condensed(str(error))
    return None


# What a parser says around the one sentence that matters to whoever mistyped something.
_NOISE = re.compile(
    r"^(?:- )*(Does not validate against|Errors:|Expected a <class 'NoneType'>|Expected a path but|"
    r"Subtypes:|Subclass types expect one of|a class path \(str\)|a dict with|Given value|"
    r"Problem with given class_path .*:$|$)"
)


def condensed(message: str) -> str:
    """Condense a message of jsonargparse's to what was given, and what was expected."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    text = ": ".join(line.rstrip(":") for line in lines if not _NOISE.match(line))
    text = re.sub(r"(?<=[^\"]): Not a valid subclass of \w+\.?", "", text)  # where the reason stands before it
    return re.sub(r'(": Not a valid subclass of \w+)', r"\1 (class_path and, if any, init_args)", text, count=1)
