"""Divide kernel computations between the processes of a distributed run, without Lightning.

Once ``torch.distributed`` is initialised, all ranks make the same calls with the same arguments, and each gets the
whole result. Wrap a call that only one rank makes, or that differs between ranks, in ``with one_process():``.

Mismatched calls raise on every rank; a rank times out after five minutes. An error on one rank is raised on all ranks.
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

from stepwise_lightning.distributed import backends
from stepwise_lightning.errors import UserError, lost_process, reason

Result = TypeVar("Result")
_REMEDY = (
    "call it on all ranks with the same arguments, or on some ranks in `with one_process():` "
    "(stepwise_lightning.theory.process_group)"
)
# Ranks may still be reading their data when the first one arrives.
_TIMEOUT = timedelta(minutes=5)
# Maximum number of rows of a tensor argument to compare between ranks.
_COMPARED_ROWS = 256
_single_process = ContextVar("single_process", default=False)
_num_checked_calls = 0


@contextmanager
def one_process() -> Iterator[None]:
    """Compute on this rank only, without communication, inside this context."""
    token = _single_process.set(True)
    try:
        yield
    finally:
        _single_process.reset(token)


def process_group() -> KernelProcessGroup:
    """Return the group of all ranks; a group of one without ``torch.distributed`` or inside :func:`one_process`."""
    if _single_process.get() or not dist.is_available() or not dist.is_initialized():
        return KernelProcessGroup(1, 0)
    return KernelProcessGroup(dist.get_world_size(), dist.get_rank())


class KernelProcessGroup:
    """Collective operations for kernel matrices; all ranks must call the same methods in the same order.

    In a group of one, every method returns its input and sends nothing. All methods raise a UserError if the connection
    to another process is lost.
    """

    def __init__(self, world_size: int, rank: int) -> None:
        self.world_size, self.rank = world_size, rank

    def check_same_call(self, name: str, *arguments: Any) -> None:
        """Raise if a rank calls ``name`` with different arguments, or not within the timeout."""
        if self.world_size == 1:
            return
        self._wait(name)
        fingerprints = self._gather_objects([_fingerprint(argument) for argument in arguments])
        if any(other != fingerprints[0] for other in fingerprints):
            raise UserError(f"the {self.world_size} ranks called {name} with different arguments: {_REMEDY}")

    def _wait(self, name: str) -> None:
        """Wait with a store, because a collective would match the next, different collective of another rank."""
        global _num_checked_calls
        store, key = dist.distributed_c10d._get_default_store(), f"stepwise_lightning/{_num_checked_calls}"
        try:
            if store.add(key, 1) == self.world_size:
                store.set(f"{key}/all", "arrived")
            store.wait([f"{key}/all"], _TIMEOUT)
        except RuntimeError as error:
            if lost := lost_process(error):
                raise lost from None
            store.add(key, -1)  # a later call can still succeed under this key
            raise UserError(
                f"rank {self.rank} of {self.world_size} called {name} and waited {_TIMEOUT.total_seconds():.0f} s "
                f"for the other ranks: {_REMEDY}"
            ) from error
        _num_checked_calls += 1

    def run_or_raise_everywhere(self, compute: Callable[[], Result]) -> Result:
        """Return the result of ``compute``, run inside :func:`one_process`; an error on one rank is raised on all.

        Other ranks raise the error of the first failed rank as a `UserError`.
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
        is_expected = error is None or isinstance(error, UserError)
        messages = self._gather_objects(
            error and (str(error) if is_expected else f"an error was raised on another rank: {reason(error)}")
        )
        if error is not None and not is_expected:
            raise error
        raise UserError(next(message for message in messages if message is not None)) from error

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Return the sum over ranks, bitwise equal on all ranks."""
        return self._communicate(dist.all_reduce, values)

    def broadcast(self, values: Tensor) -> Tensor:
        """Return the values of rank 0, because round-off that differs between ranks would change decisions."""
        return self._communicate(lambda buffer: dist.broadcast(buffer, 0), values)

    def map_rows(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return ``function(x)``, (k, …), for a function of single rows of x, (k, …); each rank computes its share."""
        if self.world_size == 1:
            return function(x)
        start, stop = (len(x) * rank // self.world_size for rank in (self.rank, self.rank + 1))

        def compute_rows() -> Tensor:
            rows = function(x[start:stop] if start < stop else x[:1])  # one row, for the shape of the result
            result = rows.new_zeros(len(x), *rows.shape[1:])
            result[start:stop] = rows[: stop - start]
            return result

        return self.all_reduce_sum(self.run_or_raise_everywhere(compute_rows))

    def symmetric_kernel(self, kernel: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
        """Return ``kernel(x, x)``, (k, k); each rank computes rows with an equal area above the diagonal."""
        if self.world_size == 1:
            return kernel(x, x)
        start, stop = (
            len(x) - round(len(x) * math.sqrt(1 - rank / self.world_size)) for rank in (self.rank, self.rank + 1)
        )

        def compute_rows() -> Tensor:
            rows = x[start:stop] if start < stop else x[:1]  # one row, for the type and device of the result
            block = kernel(rows, rows)
            matrix = block.new_zeros(len(x), len(x))
            if start < stop:
                matrix[start:stop, start:stop] = block
            if start < stop < len(x):
                matrix[start:stop, stop:] = kernel(rows, x[stop:])
                matrix[stop:, start:stop] = matrix[start:stop, stop:].T
            return matrix

        return self.all_reduce_sum(self.run_or_raise_everywhere(compute_rows))

    def _communicate(self, collective: Callable[[Tensor], Any], values: Tensor) -> Tensor:
        if self.world_size == 1:
            return values
        buffer = _communicable(values).clone(memory_format=torch.contiguous_format)
        with _lost_process_errors():
            collective(buffer)
        return buffer.to(values.device)

    def _gather_objects(self, item: Any) -> list[Any]:
        items: list[Any] = [None] * self.world_size
        with _lost_process_errors():
            dist.all_gather_object(items, item)
        return items


@contextmanager
def _lost_process_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if lost := lost_process(error):
            raise lost from None
        raise


def _communicable(values: Tensor) -> Tensor:
    """Return the values on a device that the back-end supports: GPUs for NCCL, the CPU for gloo."""
    by_device = backends()
    backend = by_device.get(values.device.type)
    if backend is None:
        return values.to("cpu" if "cpu" in by_device else next(iter(by_device)))
    return values.cpu() if backend == "gloo" else values


def _fingerprint(argument: Any) -> Any:
    """Return a small value to compare between ranks: for a tensor, shape, dtype and a hash of some rows."""
    if not isinstance(argument, Tensor) or argument.device.type == "meta":
        return repr(argument)
    rows = argument.detach().flatten(1) if argument.ndim > 1 else argument.detach().reshape(-1, 1)
    rows = rows[:: max(1, len(rows) // _COMPARED_ROWS)].contiguous().cpu()
    return tuple(argument.shape), str(argument.dtype), sha256(rows.view(torch.uint8).numpy().tobytes()).hexdigest()
