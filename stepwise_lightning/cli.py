"""The command line: ``stepwise fit --config configs/linear_photos.yaml``."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.cli import LightningCLI

from stepwise_lightning.modules import JointEmbedding


def main() -> None:
    """Run ``stepwise``; any class of this package or another can be named as model, data or callback."""
    LightningCLI(
        JointEmbedding,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
    )
