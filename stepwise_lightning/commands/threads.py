"""Number of threads of a training run on the CPU."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import lightning as L
import torch
from torch.nn.parameter import is_lazy

from stepwise_lightning.precision import single_threaded

# For the shipped networks of 12 to 90 thousand parameters a second thread gains little, and on a busy machine it costs
# many times the processor time of the step.
_SMALL = 1_000_000
_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_DEFAULT = torch.get_num_threads()  # before classes of the user are imported


def threads_of_run(trainer: L.Trainer, module: L.LightningModule) -> AbstractContextManager[None]:
    """Return a context with one thread for a small network on a CPU; an explicit number of threads is kept."""
    is_explicit = any(os.environ.get(name) for name in _VARIABLES) or torch.get_num_threads() != _DEFAULT
    size = sum(weight.numel() for weight in module.parameters() if not is_lazy(weight))
    is_small = trainer.strategy.root_device.type == "cpu" and size < _SMALL
    return single_threaded() if is_small and not is_explicit else nullcontext()
