"""Checks that stop a diverged training, without interrupting a GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from stepwise_lightning.asynchronous import CopyToCPU
from stepwise_lightning.errors import DivergedError

_REMEDY = "add an eps under its roots and in its denominators, or start from larger weights or with a bias"


class LossCheck:
    """Raise a DivergedError for a loss that is not finite: at once, or on a CUDA device in the next call.

    Reading a value waits for all operations in the queue of a GPU. A copy read in the next call does not: a whole step
    is then queued behind it.
    """

    def __init__(self) -> None:
        self._pending: tuple[CopyToCPU, int] | None = None

    def __reduce__(self) -> tuple[type[LossCheck], tuple[()]]:
        """Return an empty check for copies of a module, because events cannot be copied."""
        return LossCheck, ()

    def __call__(self, module: L.LightningModule, loss: Tensor, batch: Sequence[Tensor], now: bool) -> None:
        """Check the previous loss on a CUDA device, and with ``now``, or on a CPU, this one."""
        previous, self._pending = self._pending, None
        if previous is not None:
            _check_loss(module, previous[0].result(), previous[1], ())
        if now or loss.device.type == "cpu":
            _check_loss(module, loss, module.global_step, batch)
        elif loss.is_cuda:
            self._pending = CopyToCPU(loss), module.global_step


def check_weights(module: L.LightningModule) -> None:
    """Raise a DivergedError if a parameter is NaN or infinite, on all ranks if they hold shards of parameters."""
    parameters = list(module.parameters())
    shards = [weights.to_local() if isinstance(weights, DTensor) else weights for weights in parameters]
    finite = all(torch.stack([shard.isfinite().all() for shard in shards]).tolist())
    if any(isinstance(weights, DTensor) for weights in parameters):
        finite = module.trainer.strategy.reduce_boolean_decision(finite)
    if not finite:
        raise _diverged(module, f"the weights at step {module.global_step} are not finite", (), module.global_step)


def _check_loss(module: L.LightningModule, loss: Tensor, step: int, batch: Sequence[Tensor]) -> None:
    if not math.isfinite(value := loss.item()):
        raise _diverged(module, f"the loss at step {step} is {value}", batch, step)


def _diverged(module: L.LightningModule, event: str, batch: Sequence[Tensor], step: int) -> DivergedError:
    cause = f"training has most likely diverged: lower learning_rate (now {module.hparams['learning_rate']})"
    if step == 0:
        cause = f"the loss is not finite for the embeddings of the initial weights: {_REMEDY}"
    elif step == 1:
        cause += f", or the gradient of the loss was not finite at step 0: {_REMEDY}"
    if not batch:  # of the failed step
        cause += ", or check the data"
    elif not all(view.isfinite().all() for view in batch[:2]):
        cause = "the batch contains values that are not finite: check the data"
    return DivergedError(f"training stopped, because {event}; {cause}")
