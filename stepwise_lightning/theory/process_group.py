"""Theory's computations, shared by the processes of a distributed run. Knows nothing of Lightning.

The rule: once ``torch.distributed`` is initialised, all ranks call what is shared together, with the same arguments,
and each gets the whole result. What one rank calls alone, as in a callback of training that runs on rank zero, or what
they call with different arguments, stands in ``with one_process():``.

Ranks that do not keep to it are told in one line: arguments are compared, and nobody waits longer than five minutes for
the others. An error on one rank is raised on all, and a rank that is lost ends the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from hashlib import sha256
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from stepwise_lightning.errors import UserError, lost_process, reason

__all__ = ["Ranks", "one_process", "ranks"]

Result = TypeVar("Result")
_REMEDY = (
    "call it on all of them with the same arguments, or in `with one_process():` "
    "(stepwise_lightning.theory.process_group), which shares nothing"
)
# How long a rank waits for the others to call the same; they may still be reading their data.
_PATIENCE = timedelta(minutes=5)
# Rows that are compared between ranks, of each argument.
_COMPARED = 256
_alone = ContextVar("alone", default=False)
# How often this process has met the others.
_meetings = 0


@contextmanager
def one_process() -> Iterator[None]:
    """Let theory compute here as in one process: no rank has to call the same, and no work is shared."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def ranks() -> Ranks:
    """Return the ranks that share a computation called here: one where there are no others, or in ``one_process``."""
    if _alone.get() or not dist.is_available() or not dist.is_initialized():
        return Ranks(1, 0)
    return Ranks(dist.get_world_size(), dist.get_rank())


class Ranks:
    """The processes that share a computation; all must call the same methods in the same order.

    In one process every method returns what it is given, and nothing is sent.

    Args:
        number: P, how many there are.
        index: this one's, from 0.

    Raises:
        UserError: (all methods) a process is lost; uncaught, this one ends the program with its line alone.

    """

    def __init__(self, number: int, index: int) -> None:
        self.number, self.index = number, index

    def meet(self, name: str, *arguments: Any) -> None:
        """Wait until all ranks call ``name``, and compare its arguments.

        Raises:
            UserError: some rank does not come, or arguments differ.

        """
        if self.number == 1:
            return
        self._wait(name)
        with _errors_of_communication():
            of_all: list[Any] = [None] * self.number
            dist.all_gather_object(of_all, [_compared(argument) for argument in arguments])
        if any(other != of_all[0] for other in of_all):
            raise UserError(f"the {self.number} ranks have called {name} with different arguments: {_REMEDY}")

    def _wait(self, name: str) -> None:
        """Wait by the store, not by a collective, which would be taken for what a rank that is elsewhere calls next."""
        global _meetings
        store, key = dist.distributed_c10d._get_default_store(), f"stepwise_lightning/{_meetings}"
        try:
            if store.add(key, 1) == self.number:
                store.set(f"{key}/all", "met")
            store.wait([f"{key}/all"], _PATIENCE)
        except RuntimeError as error:
            if lost := lost_process(error):
                raise lost from None
            store.add(key, -1)  # they can still meet here later
            raise UserError(
                f"rank {self.index} of {self.number} has called {name} and waited {_PATIENCE.total_seconds():.0f} s "
                f"for the others: {_REMEDY}"
            ) from error
        _meetings += 1

    def agreed(self, compute: Callable[[], Result]) -> Result:
        """Return what ``compute`` gives on this rank, with nothing in it shared, if none of the ranks raises.

        Raises:
            UserError: on all ranks, that of the first one that has raised; a bug keeps its traceback where it is.

        """
        if self.number == 1:
            return compute()
        try:
            with one_process():
                result, error = compute(), None
        except Exception as raised:
            error = raised
        if self.total(torch.tensor([error is not None], dtype=torch.int64)) == 0:
            return result
        texts: list[Any] = [None] * self.number
        own = str(error) if isinstance(error, UserError) else error and f"a rank has failed: {reason(error)}"
        with _errors_of_communication():
            dist.all_gather_object(texts, own)
        if error is not None and not isinstance(error, UserError):
            raise error
        raise UserError(next(text for text in texts if text is not None)) from error

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over the ranks, the same bits on all."""
        if self.number == 1:
            return values
        sent = _sendable(values).clone(memory_format=torch.contiguous_format)
        with _errors_of_communication():
            dist.all_reduce(sent)
        return sent.to(values.device)

    def of_first(self, values: Tensor) -> Tensor:
        """Return what rank 0 holds, where others may differ in the last digits, and would decide differently."""
        if self.number == 1:
            return values
        sent = _sendable(values).clone(memory_format=torch.contiguous_format)
        with _errors_of_communication():
            dist.broadcast(sent, 0)
        return sent.to(values.device)

    def share(self, size: int, multiple: int = 1, index: int | None = None) -> slice:
        """Return which of so many rows this rank holds (or another), in multiples of ``multiple``."""
        chunk = self._chunk(size, multiple)
        start = min((self.index if index is None else index) * chunk, size)
        return slice(start, min(start + chunk, size))

    def gathered(self, own: Tensor, size: int, multiple: int = 1) -> Tensor:
        """Return all rows, (size, …), of which each rank holds its :meth:`share`."""
        if self.number == 1:
            return own
        chunk = self._chunk(size, multiple)
        sent = _sendable(_padded(own, chunk))
        rows = sent.new_empty(self.number * chunk, *own.shape[1:])
        with _errors_of_communication():
            dist.all_gather_into_tensor(rows, sent)
        return rows[:size].to(own.device)

    def scattered_total(self, rows: Tensor, multiple: int = 1) -> Tensor:
        """Return this rank's :meth:`share` of the sum over the ranks of (size, …)."""
        if self.number == 1:
            return rows
        chunk = self._chunk(len(rows), multiple)
        sent = _sendable(_padded(rows, self.number * chunk))
        own = sent.new_empty(chunk, *rows.shape[1:])
        with _errors_of_communication():
            dist.reduce_scatter_tensor(own, sent)
        share = self.share(len(rows), multiple)
        return own[: share.stop - share.start].to(rows.device)

    def by_rows(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return ``function(x)``, of (k, …) to (k, …) row by row, each rank with its share of the rows."""
        if self.number == 1:
            return function(x)
        share = self.share(len(x))
        # a rank without a row takes one all the same, to know what a row of the result is
        rows = self.agreed(lambda: function(x[share] if share.start < share.stop else x[:1]))
        return self.gathered(rows[: share.stop - share.start], len(x))

    def symmetric(self, function: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
        """Return ``function(x, x)``, a symmetric (k, k), each rank with as much of what is above the diagonal."""
        if self.number == 1:
            return function(x, x)
        start, stop = (
            len(x) - round(len(x) * math.sqrt(1 - index / self.number)) for index in (self.index, self.index + 1)
        )

        def part() -> Tensor:
            rows, rest = x[start:stop] if start < stop else x[:1], x[stop:]
            square = function(rows, rows)
            whole = square.new_zeros(len(x), len(x))
            if start < stop:
                whole[start:stop, start:stop] = square
            if start < stop < len(x):
                whole[start:stop, stop:] = function(rows, rest)
                whole[stop:, start:stop] = whole[start:stop, stop:].T
            return whole

        return self.total(self.agreed(part))

    def _chunk(self, size: int, multiple: int) -> int:
        return multiple * -(-size // (multiple * self.number))


@contextmanager
def _errors_of_communication() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if lost := lost_process(error):
            raise lost from None
        raise


def _sendable(values: Tensor) -> Tensor:
    """Return the values where the back-end takes them: NCCL from GPUs alone, gloo most things from the CPU alone."""
    backend = dist.get_backend()
    if backend == "nccl":
        return values.cuda()
    return values.cpu() if backend == "gloo" else values


def _padded(rows: Tensor, size: int) -> Tensor:
    padding = rows.new_zeros(size - len(rows), *rows.shape[1:])
    return torch.cat([rows, padding]) if len(padding) else rows.contiguous()


def _compared(argument: Any) -> Any:
    """Return what tells whether two ranks hold the same argument: of a tensor, some of its bytes."""
    if not isinstance(argument, Tensor) or argument.device.type == "meta":
        return repr(argument)
    some = argument.detach().flatten(1) if argument.ndim > 1 else argument.detach().reshape(-1, 1)
    some = some[:: max(1, len(some) // _COMPARED)].contiguous().cpu()
    return tuple(argument.shape), str(argument.dtype), sha256(some.view(torch.uint8).numpy().tobytes()).hexdigest()
