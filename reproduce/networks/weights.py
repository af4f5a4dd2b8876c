"""Callback that saves the weights of a long run, for figures of its learned modes."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from stepwise_lightning.callbacks.clock import expected_end
from stepwise_lightning.spectrum.schedule import Schedule

# With 20,000 steps, 87 files: consecutive ones differ by 10 % in time, as modes are learned at log-spaced times.
_NUM_POINTS = 100


class LogSpacedWeights(Checkpoint):
    """Save the weights at log-spaced steps, as ``step=STEP.ckpt``.

    Args:
        dirpath: folder of the files.

    """

    def __init__(self, dirpath: str) -> None:
        self.dirpath = Path(dirpath)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Create the schedule, without the steps before a resumed one."""
        self._schedule = Schedule(expected_end(trainer), _NUM_POINTS)
        self._schedule.is_due(trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save the weights at a scheduled step."""
        if self._schedule.is_due(trainer.global_step):
            trainer.save_checkpoint(self.dirpath / f"step={trainer.global_step}.ckpt", weights_only=True)
