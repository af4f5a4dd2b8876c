"""A minimal model that records its training batches."""

import lightning as L
import torch
from torch import Tensor, nn

from stepwise_lightning import TwoViewDataModule


class Recorder(L.LightningModule):
    """Minimal model that records its batches and saves a checkpoint after step ``save_at``, or after epoch 1 for −1."""

    def __init__(self, save_at: int | None = None, path: str = "") -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.save_at, self.path = save_at, path
        self.batches: list[Tensor] = []

    def training_step(self, batch, batch_idx: int) -> Tensor:
        self.batches.append(torch.cat(batch[:2]))
        return self.layer(batch[0].mean()[None]).sum()

    def validation_step(self, batch, batch_idx: int) -> None: ...

    test_step = validation_step

    def on_train_batch_end(self, outputs, batch, batch_idx: int) -> None:
        if self.trainer.global_step == self.save_at:
            self.trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self) -> None:
        if self.save_at == -1 and self.current_epoch == 1:
            self.trainer.save_checkpoint(self.path)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(model: Recorder, data: TwoViewDataModule, ckpt_path: str | None = None, **settings) -> list[Tensor]:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_epochs=3, enable_model_summary=False, **quiet, **settings)
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return model.batches
