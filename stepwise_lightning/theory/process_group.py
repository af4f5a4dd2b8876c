"""Theory's computations, shared by the processes of a distributed run. Knows nothing of Lightning.

The rule: once ``torch.distributed`` is initialised, all ranks call what is shared together, with the same arguments,
and each gets the whole result. What one rank calls alone, as in a callback of training that runs on rank zero, or what
they call with different arguments, stands in ``with one_process():``.

Mismatched calls raise on every rank: arguments are compared, and a rank times out after five minutes. An error on one
rank is raised on all ranks, and the loss of a process ends the others.
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

__all__ = ["KernelProcessGroup", "one_process", "process_group"]

Result = TypeVar("Result")
_REMEDY = (
    "call it on all of them with the same arguments, or in `with one_process():` "
    "(stepwise_lightning.theory.process_group), which shares nothing"
)
# How long a rank waits for the others to call the same; they may still be reading their data.
_TIMEOUT = timedelta(minutes=5)
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


def process_group() -> KernelProcessGroup:
    """Return the ranks that share a computation called here: one where there are no others, or in ``one_process``."""
    if _alone.get() or not dist.is_available() or not dist.is_initialized():
        return KernelProcessGroup(1, 0)
    return KernelProcessGroup(dist.get_world_size(), dist.get_rank())


class KernelProcessGroup:
    """The processes that share a computation; all must call the same methods in the same order.

    In one process every method returns what it is given, and nothing is sent.

    Args:
        world_size: number of processes, P.
        rank: index of this process, from 0.

    Raises:
        UserError: (all methods) a process is lost; uncaught, this one ends the program with its line alone.

    """

    def __init__(self, world_size: int, rank: int) -> None:
        self.world_size, self.rank = world_size, rank

    def check_same_call(self, name: str, *arguments: Any) -> None:
        """Wait until all ranks call ``name``, and compare its arguments.

        Raises:
            UserError: some rank does not come, or arguments differ.

        """
        if self.world_size == 1:
            return
        self._wait(name)
        with _errors_of_communication():
            of_all: list[Any] = [None] * self.world_size
            dist.all_gather_object(of_all, [_compared(argument) for argument in arguments])
        if any(other != of_all[0] for other in of_all):
            raise UserError(f"the {self.world_size} ranks have called {name} with different arguments: {_REMEDY}")

    def _wait(self, name: str) -> None:
        """Wait by the store, not by a collective, which would be taken for what a rank that is elsewhere calls next."""
        global _meetings
        store, key = dist.distributed_c10d._get_default_store(), f"stepwise_lightning/{_meetings}"
        try:
            if store.add(key, 1) == self.world_size:
                store.set(f"{key}/all", "met")
            store.wait([f"{key}/all"], _TIMEOUT)
        except RuntimeError as error:
            if lost := lost_process(error):
                raise lost from None
            store.add(key, -1)  # they can still meet here later
            raise UserError(
                f"rank {self.rank} of {self.world_size} has called {name} and waited {_TIMEOUT.total_seconds():.0f} s "
                f"for the others: {_REMEDY}"
            ) from error
        _meetings += 1

    def run_or_raise_everywhere(self, compute: Callable[[], Result]) -> Result:
        """Return what ``compute`` gives on this rank, with nothing in it shared, if none of the ranks raises.

        Raises:
            UserError: on all ranks, that of the first one that has raised; a bug keeps its traceback where it is.

        """
        if self.world_size == 1:
            return compute()
        try:
            with one_process():
                result, error = compute(), None
        except Exception as raised:
            error = raised
        if self.all_reduce_sum(torch.tensor([error is not None], dtype=torch.int64)) == 0:
            return result
        texts: list[Any] = [None] * self.world_size
        own = str(error) if isinstance(error, UserError) else error and f"a rank has failed: {reason(error)}"
        with _errors_of_communication():
            dist.all_gather_object(texts, own)
        if error is not None and not isinstance(error, UserError):
            raise error
        raise UserError(next(text for text in texts if text is not None)) from error

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Return the sum over the ranks, the same bits on all."""
        if self.world_size == 1:
            return values
        sent = _sendable(values).clone(memory_format=torch.contiguous_format)
        with _errors_of_communication():
            dist.all_reduce(sent)
        return sent.to(values.device)

    def broadcast(self, values: Tensor) -> Tensor:
        """Return what rank 0 holds, where others may differ in the last digits, and would decide differently."""
        if self.world_size == 1:
            return values
        sent = _sendable(values).clone(memory_format=torch.contiguous_format)
        with _errors_of_communication():
            dist.broadcast(sent, 0)
        return sent.to(values.device)

    def shard(self, size: int, multiple: int = 1, rank: int | None = None) -> slice:
        """Return which of so many rows this rank holds (or another), in multiples of ``multiple``."""
        chunk = self._chunk(size, multiple)
        start = min((self.rank if rank is None else rank) * chunk, size)
        return slice(start, min(start + chunk, size))

    def all_gather_rows(self, own: Tensor, size: int, multiple: int = 1) -> Tensor:
        """Return all rows, (size, …), of which each rank holds its :meth:`shard`."""
        if self.world_size == 1:
            return own
        chunk = self._chunk(size, multiple)
        sent = _sendable(_padded(own, chunk))
        rows = sent.new_empty(self.world_size * chunk, *own.shape[1:])
        with _errors_of_communication():
            dist.all_gather_into_tensor(rows, sent)
        return rows[:size].to(own.device)

    def reduce_scatter_sum(self, rows: Tensor, multiple: int = 1) -> Tensor:
        """Return this rank's :meth:`shard` of the sum over the ranks of (size, …)."""
        if self.world_size == 1:
            return rows
        chunk = self._chunk(len(rows), multiple)
        sent = _sendable(_padded(rows, self.world_size * chunk))
        own = sent.new_empty(chunk, *rows.shape[1:])
        with _errors_of_communication():
            dist.reduce_scatter_tensor(own, sent)
        shard = self.shard(len(rows), multiple)
        return own[: shard.stop - shard.start].to(rows.device)

    def map_rows(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return ``function(x)``, of (k, …) to (k, …) row by row, each rank with its share of the rows."""
        if self.world_size == 1:
            return function(x)
        shard = self.shard(len(x))
        # a rank without a row takes one all the same, to know what a row of the result is
        rows = self.run_or_raise_everywhere(lambda: function(x[shard] if shard.start < shard.stop else x[:1]))
        return self.all_gather_rows(rows[: shard.stop - shard.start], len(x))

    def symmetric_kernel(self, function: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
        """Return ``function(x, x)``, a symmetric (k, k), each rank with as much of what is above the diagonal."""
        if self.world_size == 1:
            return function(x, x)
        start, stop = (
            len(x) - round(len(x) * math.sqrt(1 - rank / self.world_size)) for rank in (self.rank, self.rank + 1)
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

        return self.all_reduce_sum(self.run_or_raise_everywhere(part))

    def _chunk(self, size: int, multiple: int) -> int:
        return multiple * -(-size // (multiple * self.world_size))


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
