"""Runs of a linear model on streams of samples, with ``LastCheckpoint``."""

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, IterableDataset

from stepwise_lightning import LastCheckpoint


class Stream(IterableDataset):
    """Samples without a length, endless or of a given number."""

    def __init__(self, number: float = float("inf")) -> None:
        self.number = number

    def __iter__(self):
        generator, count = torch.Generator().manual_seed(0), 0
        while count < self.number:
            yield torch.randn(4, generator=generator)
            count += 1


class Model(L.LightningModule):
    """Linear model with one optimiser, or with two and manual optimisation."""

    def __init__(self, optimizers: int = 1) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 3) for _ in range(optimizers))
        self.automatic_optimization = optimizers == 1
        self.batches: list[float] = []

    def forward(self, x):
        return sum(layer(x) for layer in self.layers)

    def training_step(self, batch, batch_idx):
        self.batches.append(float(batch[0, 0]))
        loss = self(batch).square().mean()
        if not self.automatic_optimization:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
        return loss

    def configure_optimizers(self):
        optimizers = [torch.optim.SGD(layer.parameters(), lr=0.01) for layer in self.layers]
        return optimizers[0] if len(optimizers) == 1 else optimizers


def loader(number=float("inf"), sized=False):
    data = torch.randn(int(number), 4, generator=torch.Generator().manual_seed(0)) if sized else Stream(number)
    return DataLoader(data, batch_size=2)


def trainer_for(folder, *callbacks, every=10, **options):
    defaults = {"logger": CSVLogger(folder), "enable_progress_bar": False, "enable_model_summary": False}
    callbacks = [*callbacks, LastCheckpoint(every)]
    return L.Trainer(accelerator="cpu", callbacks=callbacks, **(defaults | options))


def saved(folder):
    """Return the step of each last*.ckpt below a folder."""
    paths = sorted(Path(folder).rglob("last*.ckpt"))
    return {path.stem: torch.load(path, weights_only=True)["global_step"] for path in paths}
