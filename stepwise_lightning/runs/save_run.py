"""What a run of the command line writes beside its logs when it starts: its configuration, and where it came from."""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback

from stepwise_lightning.files import atomic_write_text
from stepwise_lightning.runs.provenance import provenance


class SaveRun(SaveConfigCallback):
    """Writes ``config.yaml`` (complete, as run) and ``provenance.json`` (versions, commit, machine) beside the logs.

    A run that is continued in its folder keeps them, and gets another pair, ``config_step_300.yaml`` and so on.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write both files on rank 0."""
        super().setup(trainer, pl_module, stage)
        directory = trainer.log_dir  # a broadcast: every rank must ask
        if trainer.is_global_zero and directory is not None:
            name = self.config_filename.replace("config", "provenance").replace(".yaml", ".json")
            atomic_write_text(Path(directory, name), json.dumps(provenance(), indent=2) + "\n")
