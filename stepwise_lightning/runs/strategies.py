"""Check of the Trainer's strategy: which ones training, measurements and checkpoints support."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch.nn.modules.batchnorm import _BatchNorm

from stepwise_lightning.errors import UserError


def check_strategy(trainer: L.Trainer, saves: bool = False) -> None:
    """Raise a UserError for a strategy under which a module cannot be measured, or with ``saves``, be saved in a file.

    Fully sharded data parallelism is supported in its second version, ``fully_shard`` in ``configure_model``.
    """
    strategy = trainer.strategy
    if isinstance(strategy, (DeepSpeedStrategy, FSDPStrategy)):
        raise UserError(
            f"{type(strategy).__name__} is not supported, because a sharded module cannot be called outside of its "
            "training step: use strategy='ddp', or ModelParallelStrategy with fully_shard in configure_model"
        )
    if (
        isinstance(strategy, DDPStrategy)
        and strategy.root_device.type == "cpu"
        and type(strategy._layer_sync) is TorchSyncBatchNorm
        and any(isinstance(layer, _BatchNorm) for layer in trainer.lightning_module.modules())
    ):
        raise UserError(
            "sync_batchnorm=True needs GPUs: on CPUs set sync_batchnorm=False and "
            "plugins=stepwise_lightning.sync_batchnorm.SyncBatchNorm"
        )
    if not isinstance(strategy, ModelParallelStrategy):
        return
    if (size := strategy.device_mesh["tensor_parallel"].size()) > 1:
        raise UserError(
            f"tensor parallelism is not supported, got tensor_parallel_size {size}: use "
            f"ModelParallelStrategy(data_parallel_size={trainer.world_size}, tensor_parallel_size=1)"
        )
    if saves and strategy._save_distributed_checkpoint:
        raise UserError(
            "LastCheckpoint cannot replace a checkpoint of several files atomically: use "
            "ModelParallelStrategy(save_distributed_checkpoint=False)"
        )
