"""Batch normalisation over the global batch, also on CPUs."""

from __future__ import annotations

import torch.distributed as dist
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from stepwise_lightning.distributed import all_gather_with_grad, backends, is_distributed, local_rows


class SyncBatchNorm(TorchSyncBatchNorm):
    """Batch normalisation over the global batch, also on CPUs: ``Trainer(plugins=[SyncBatchNorm()])``.

    On GPUs this is ``Trainer(sync_batchnorm=True)``, that is, ``torch.nn.SyncBatchNorm``, which does not support CPUs.
    With the gloo backend each rank gathers the input of the layer, normalises the joined batch with the ordinary kernel
    and keeps its rows. Every rank repeats the computation, and statistics, running statistics and gradients equal those
    in one process. In evaluation mode there is no communication.
    """

    def __init__(self) -> None:
        self._hooks: list[RemovableHandle] = []

    def apply(self, model: nn.Module) -> nn.Module:
        """Synchronise all batch-normalisation layers of ``model``."""
        # Lightning moves the model to its device later, so the backend determines the kind of device.
        if not dist.is_available() or not dist.is_initialized() or backends().get("cuda", "gloo") != "gloo":
            return super().apply(model)
        for layer in model.modules():
            if isinstance(layer, _BatchNorm):
                self._hooks.append(layer.register_forward_pre_hook(_gather_input))
                self._hooks.append(layer.register_forward_hook(_keep_local_rows))
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Undo :meth:`apply`."""
        if not self._hooks:
            return super().revert(model)
        while self._hooks:
            self._hooks.pop().remove()
        return model


def _gather_input(layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
    return (all_gather_with_grad(inputs[0]),) if layer.training else None


def _keep_local_rows(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
    return local_rows(output) if layer.training and is_distributed() else None
