"""The command line: ``stepwise fit --config configs/barlow_twins_photos.yaml``."""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback

from stepwise_lightning.modules import JointEmbedding
from stepwise_lightning.provenance import provenance


class SaveRun(SaveConfigCallback):
    """Writes ``config.yaml`` (complete, as run) and ``provenance.json`` (versions, commit, machine) beside the logs."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write both files on rank 0."""
        super().setup(trainer, pl_module, stage)
        directory = trainer.log_dir  # a broadcast: every rank must ask
        if trainer.is_global_zero and directory is not None:
            text = json.dumps(provenance(), indent=2) + "\n"
            Path(directory, "provenance.json").write_text(text, encoding="utf-8")


def main() -> None:
    """Run ``stepwise``; any class of this package or another can be named as model, data or callback."""
    LightningCLI(
        JointEmbedding,
        L.LightningDataModule,
        save_config_callback=SaveRun,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
    )
