"""A supervised classifier that trains in a fraction of a second."""

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from stepwise_lightning import LastCheckpoint

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
BATCHES = DataLoader(TensorDataset(X, Y), batch_size=16)


class Classifier(L.LightningModule):
    """Supervised model with batch normalisation."""

    def __init__(self, normalise=True):
        super().__init__()
        torch.manual_seed(3)
        norm = nn.BatchNorm1d(6) if normalise else nn.Identity()
        self.features = nn.Sequential(nn.Linear(8, 6), norm, nn.ReLU())
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.features(x))

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module, folder, *callbacks, data=BATCHES, logger=None, ckpt_path=None, **options):
    """Train for five epochs of four steps, with a CSVLogger by default."""
    options = {"max_epochs": 5} | options
    trainer = L.Trainer(
        accelerator="cpu", logger=CSVLogger(folder) if logger is None else logger, callbacks=list(callbacks),
        log_every_n_steps=1, enable_model_summary=False, enable_progress_bar=False,
        enable_checkpointing=any(isinstance(callback, LastCheckpoint) for callback in callbacks),
        default_root_dir=folder, **options,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer
