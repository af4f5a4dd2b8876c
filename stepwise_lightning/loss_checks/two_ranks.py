"""A loss in two processes with a process group, for :func:`stepwise_lightning.check_loss`.

DDP averages the gradients of the ranks. The loss on shards is right if this average equals the gradient of one process
on the joined batch.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from stepwise_lightning.distributed import all_gather_with_grad
from stepwise_lightning.errors import UserError, reason
from stepwise_lightning.theory.loss_derivatives import TOLERANCE, PairLoss

_TIMEOUT = 120  # seconds, of which starting a new interpreter and importing torch take a few
_SCALE_TOLERANCE = 0.1  # of a factor 2 or 1/2; a variance with 1/(n − 1) is not quite the same for a repeated batch

_EQUAL = "mean gradient of the ranks equals one process"


class Evaluation(NamedTuple):
    """A loss, and its gradient in the embeddings of both views, (2, n, d); over ranks, the means that DDP computes."""

    value: float
    gradient: Tensor


class TwoRanks(NamedTuple):
    """A loss on a batch, and on its halves on two ranks; a string is an error."""

    batch: Evaluation | str  #: one process, the whole batch
    repeated: Evaluation | str  #: one process, the first half of the batch twice
    alone: Evaluation | str  #: each rank its half, without a process group
    halves: Evaluation | str  #: each rank its half, in a process group
    equal_halves: Evaluation | str  #: both ranks the first half, in a process group
    gathered: Evaluation | str  #: each rank the whole batch, gathered as in ``JointEmbedding``

    def of_loss(self) -> tuple[str, str, str]:
        """Return result, value and remedy where a module under DDP passes each shard to the loss."""
        if error := next((result for result in self[:5] if isinstance(result, str)), None):
            return "not checked", error, ""
        batch, repeated, _, halves, equal_halves = cast(tuple[Evaluation, ...], self[:5])
        difference = deviation(halves.gradient, batch.gradient)
        if difference <= tolerance(batch.gradient):
            return "pass", _EQUAL, ""
        if not self.communicates:
            remedy = "none in JointEmbedding; in other modules gather the embeddings of all ranks"
            return "note", f"no communication: mean gradient of the ranks deviates by {difference:.2g}", remedy
        value, remedies = [], []
        # Equal halves have equal statistics, and show the scale of the gradient alone.
        scale = float((equal_halves.gradient * repeated.gradient).sum() / repeated.gradient.square().sum())
        if abs(2 * scale - 1) < _SCALE_TOLERANCE:
            value.append("gradient divided by the number of ranks")
            remedies.append("gather by stepwise_lightning.distributed.all_gather_with_grad, or reduce with a gradient")
        elif abs(scale / 2 - 1) < _SCALE_TOLERANCE:
            value.append("gradient multiplied by the number of ranks")
            remedies.append("return the mean over pairs, not the sum or the number of ranks times the mean")
        if abs(halves.value - batch.value) > tolerance(batch.gradient) * abs(batch.value):
            value.append(f"mean loss of the ranks {halves.value:.4g}, not {batch.value:.4g}: statistics of each shard")
            remedies.append("compute means and variances over the global batch")
        elif not value:
            value.append(f"right loss, but its gradient deviates by {difference:.2g}")
            remedies.append("gather and reduce with operations that have a gradient")
        return "fail", "; ".join(value), "; ".join(remedies)

    def of_module(self) -> tuple[str, str, str]:
        """Return result, value and remedy where the module gathers the embeddings and passes the global batch."""
        batch, gathered = self.batch, self.gathered
        if isinstance(batch, str) or isinstance(gathered, str):
            value = batch if isinstance(batch, str) else str(gathered)
            return "not checked", value, ""
        difference = deviation(gathered.gradient, batch.gradient)
        if difference <= tolerance(batch.gradient):
            return "pass", _EQUAL, ""
        value = f"mean gradient of the ranks deviates by {difference:.2g}"
        if self.communicates:
            remedy = "switch off its communication (gather_distributed=False): the module gathers the embeddings"
            return "note", f"the loss gathers a global batch again: {value}", remedy
        return "fail", value, "compute the loss from its arguments only, equally on all ranks"

    @property
    def communicates(self) -> bool:
        """True if a process group changes the loss or its gradient on a shard."""
        if isinstance(self.alone, str) or isinstance(self.halves, str):
            return True
        return self.alone.value != self.halves.value or not torch.equal(self.alone.gradient, self.halves.gradient)


def evaluate_on_two_ranks(loss: PairLoss, z: Tensor) -> TwoRanks:
    """Evaluate the loss on two ranks, each with half of the pairs of z (2, n, d).

    The processes are forked on Linux, and can then run any loss, also a lambda or a function of a notebook. With an
    accelerator, autograd refuses forks: as on other systems, new interpreters are started, and the loss is pickled.
    """
    if dist.is_initialized():
        return TwoRanks(*["this process is in a process group: call check_loss before it is created"] * 6)
    forks = sys.platform == "linux" and not torch.accelerator.is_available()
    context: Any = multiprocessing.get_context("fork" if forks else "spawn")
    with TemporaryDirectory() as folder:
        ranks = [context.Process(target=_run, args=(loss, z, rank, folder), daemon=True) for rank in (0, 1)]
        try:
            _run_to_end(ranks)
        except UserError as error:
            return TwoRanks(*[str(error)] * 6)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
        first, second = (torch.load(Path(folder, f"{rank}.pt")) for rank in (0, 1))
    one_process = [result if isinstance(result, str) else Evaluation(*result) for result in first[:2]]
    return TwoRanks(*one_process, *(_mean(*pair) for pair in zip(first[2:], second[2:], strict=True)))


def value_and_gradient(loss: PairLoss, z: Tensor, prepare: Callable[[Tensor], Tensor] = Tensor.clone) -> Evaluation:
    """Return the loss and its gradient in the embeddings z (2, n, d), after ``prepare`` of each view."""
    with torch.enable_grad():
        leaf = z.detach().clone().requires_grad_()
        value = loss(prepare(leaf[0]), prepare(leaf[1]))
        return Evaluation(float(value.detach()), torch.autograd.grad(value, leaf)[0])


def deviation(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, relative to the norm of the expected values."""
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float64).tiny))


def tolerance(z: Tensor) -> float:
    """Return the largest deviation of equal functions in the data type of z."""
    return TOLERANCE if z.dtype == torch.float64 else 1e-3


def _run_to_end(ranks: list[Any]) -> None:
    """Run the processes; raise a UserError if they do not end well."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12, for a fork in a process with threads
            for process in ranks:
                process.start()
    except Exception as error:
        raise UserError(f"the loss cannot be sent to another process: {reason(error)}: define it in a module") from None
    deadline = time.monotonic() + _TIMEOUT
    for process in ranks:
        process.join(max(0, deadline - time.monotonic()))
    statuses = [process.exitcode for process in ranks]
    if None in statuses:
        raise UserError(f"two ranks do not finish within {_TIMEOUT} s: the loss must communicate equally on all ranks")
    if any(statuses):
        remedy = 'define the loss in a module, and guard the script with if __name__ == "__main__"'
        raise UserError(f"two processes end with exit statuses {statuses}: {remedy}")


def _run(loss: PairLoss, z: Tensor, rank: int, folder: str) -> None:
    """Write this rank's evaluations of the loss to the folder."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # a forked process cannot use the threads of its parent
    for stream in (1, 2):  # to which Gloo prints
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    shards = z.chunk(2, 1)
    results = [_attempt(loss, z), _attempt(loss, torch.cat([shards[0], shards[0]], 1)), _attempt(loss, shards[rank])]
    limit = timedelta(seconds=_TIMEOUT)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2, timeout=limit)
    results += [_attempt(loss, shards[rank]), _attempt(loss, shards[0])]
    results += [_attempt(loss, shards[rank], all_gather_with_grad)]
    torch.save(results, Path(folder, f"{rank}.pt"))
    while not Path(folder, f"{1 - rank}.pt").exists():  # the other rank may still receive
        time.sleep(0.01)
    os._exit(0)  # with torch 2.6, a process may hang when it destroys the group


def _attempt(loss: PairLoss, z: Tensor, *prepare: Callable[[Tensor], Tensor]) -> tuple[float, Tensor] | str:
    try:
        value, gradient = value_and_gradient(loss, z, *prepare)
    except Exception as error:
        return reason(error)
    return value, gradient


def _mean(first: Any, second: Any) -> Evaluation | str:
    """Return the mean loss of two ranks and the joined gradients, divided by the number of ranks."""
    for result in (first, second):
        if isinstance(result, str):
            return result
    return Evaluation((first[0] + second[0]) / 2, torch.cat([first[1], second[1]], 1) / 2)
