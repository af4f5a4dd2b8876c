"""What a run of the command line writes beside its logs when it starts: its configuration, and where it came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback

from stepwise_lightning.callbacks.tensorboard import log_settings
from stepwise_lightning.errors import cannot_write
from stepwise_lightning.files import atomic_write_text
from stepwise_lightning.runs.folders import free_name, run_folder
from stepwise_lightning.runs.provenance import provenance

_SHOWN = ("alpha", "encoder", "init_std", "learning_rate", "loss", "momentum", "seed", "weight_decay")


class SaveRun(SaveConfigCallback):
    """Writes ``config.yaml`` (complete, as run) and ``provenance.json`` (versions, commits, machine) beside the logs.

    A run that is continued in its folder keeps them, and gets another pair, ``config_step_300.yaml`` and so on; another
    run in the same folder writes ``config-v1.yaml``. TensorBoard's table of hyperparameters gets the loss, its rates,
    the encoder and the scale that it starts from.

    Raises:
        OSError: they cannot be written.

    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        # Lightning would write to the loggers' common folder, and refuse to start where there is a file already.
        super().__init__(*arguments, **(options | {"save_to_log_dir": False}))

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write both files on rank 0, if this is a run: what validates or tests one leaves nothing."""
        if stage != "fit":
            return
        if not self.already_saved:
            self._folder = run_folder(trainer, self.config.get("ckpt_path"))  # a broadcast: every rank must ask
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write both files."""

        def paths(stem: str) -> tuple[Path, Path]:
            return self._folder / f"{stem}.yaml", self._folder / f"{stem.replace('config', 'provenance', 1)}.json"

        stem = Path(self.config_filename).stem
        if not self.overwrite:
            stem = free_name(stem, lambda name: any(path.exists() for path in paths(name)))
        config, origin = paths(stem)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(self._folder, error) from error
        atomic_write_text(config, self.parser.dump(self.config, skip_none=False))
        atomic_write_text(origin, json.dumps(provenance(), indent=2) + "\n")
        log_settings(trainer, _settings(self.config.as_dict()))


def _settings(config: dict[str, Any]) -> dict[str, bool | float | str]:
    """Return what most distinguishes runs, few enough for one look; ``config.yaml`` has all."""
    model = dict(config["model"].get("init_args") or {})
    encoder = model.pop("encoder", None)
    parts = dict((encoder.get("init_args") if isinstance(encoder, dict) else None) or {})
    settings = {"loss": _name(config["model"])} | parts | model
    if isinstance(encoder, dict) and "class_path" in encoder:
        settings["encoder"] = parts.get("backbone", _name(encoder))
    shown = {name: settings.get(name) for name in _SHOWN}
    return {name: value for name, value in shown.items() if isinstance(value, (bool, int, float, str))}


def _name(spec: dict[str, Any]) -> str:
    return str(spec["class_path"]).rpartition(".")[2]
