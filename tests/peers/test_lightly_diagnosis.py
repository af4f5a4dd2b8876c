"""Diagnoses of SimCLR from lightly, and of a BYOL of the user's own: a verdict, without growth rates."""

import copy

import lightning as L
import pytest
import torch
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead, SimCLRProjectionHead
from lightly.models.utils import update_momentum
from torch import nn

from stepwise_lightning import PlateauMonitor, SpectrumLogger, diagnose


def pairs(seed, number=64):
    generator = torch.Generator().manual_seed(seed)
    content, *noise = torch.randn(3, number, 12, generator=generator) * torch.logspace(0, -1, 12)
    return [content + 0.3 * each for each in noise]


class Data(L.LightningDataModule):
    """Vectors of twelve numbers."""

    def train_dataloader(self):
        return torch.utils.data.DataLoader([pairs(seed) for seed in range(16)], batch_size=None)

    def probe_pairs(self):
        return pairs(100, 128)


class Method(L.LightningModule):
    """Backbone and head."""

    def forward(self, x):
        return self.head(self.backbone(x))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class SimCLR(Method):
    """SimCLR as in lightly's examples."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(12, 32), nn.ReLU())
        self.head = SimCLRProjectionHead(32, 32, 8)
        self.criterion = NTXentLoss()

    def training_step(self, batch, batch_idx):
        return self.criterion(self(batch[0]), self(batch[1]))


class PlainHead(SimCLR):
    """SimCLR with a linear layer at the end."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(32, 8)


class BYOL(Method):
    """BYOL with a target network."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(12, 32), nn.ReLU())
        self.head, self.predictor = BYOLProjectionHead(32, 32, 8), BYOLPredictionHead(8, 32, 8)
        self.target = copy.deepcopy(nn.Sequential(self.backbone, self.head)).requires_grad_(False)
        self.criterion = NegativeCosineSimilarity()

    def training_step(self, batch, batch_idx):
        update_momentum(self.backbone, self.target[0], 0.99)
        update_momentum(self.head, self.target[1], 0.99)
        x, y = batch
        first, second = (self.predictor(self(view)) for view in batch)
        return self.criterion(first, self.target(y)) + self.criterion(second, self.target(x))


def trained(kind, tmp_path, recwarn):
    torch.manual_seed(0)
    module, spectra = kind(), SpectrumLogger(num_points=40, matrices=["covariance"])
    trainer = L.Trainer(
        max_steps=300, accelerator="cpu", logger=False, callbacks=[spectra, PlateauMonitor()],
        default_root_dir=tmp_path,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=Data())
    assert not [each for each in recwarn if "learned since" in str(each.message)]
    return spectra.record, module


@pytest.mark.parametrize("kind", [SimCLR, PlainHead, BYOL])
@pytest.mark.filterwarnings("ignore")
def test_run_that_learns_gets_a_verdict(kind, tmp_path, recwarn):
    record, module = trained(kind, tmp_path, recwarn)
    loss = None if kind is BYOL else module.criterion
    result = diagnose(record, module, [pairs(seed) for seed in range(200, 216)], loss=loss, num_pairs=64, max_steps=900)
    assert result.verdict in ("learning", "plateau") and result.num_learned is None and not result.cause
    if kind is BYOL:
        assert "Growth rates are not known, because BYOL has no known loss" in str(result)
    elif kind is SimCLR:
        assert "does not end in its last linear layer" in str(result)
