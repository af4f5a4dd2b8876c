"""Files that a run of the command line writes when it starts: configuration, provenance, pointer to the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback

from stepwise_lightning.callbacks.tensorboard import log_settings
from stepwise_lightning.files import atomic_write_text, reserve
from stepwise_lightning.runs.folders import free_name, run_folder
from stepwise_lightning.runs.latest import write_pointer
from stepwise_lightning.runs.provenance import provenance
from stepwise_lightning.user_loss import saved_name

_SHOWN = ("alpha", "encoder", "init_std", "learning_rate", "loss", "momentum", "seed", "weight_decay")


class SaveRun(SaveConfigCallback):
    """Write ``config.yaml`` (complete) and ``provenance.json`` (versions, commits, machine) to the folder of the run.

    A resumed run keeps both, and adds ``config_step_300.yaml`` and ``provenance_step_300.json``; another run in the
    same folder writes ``config-v1.yaml``. TensorBoard's table of hyperparameters gets the loss, its rates, the encoder
    and its initial scale. When training starts, the pointer file for ``--ckpt_path last`` is written
    (:mod:`stepwise_lightning.runs.latest`). ``text`` is the configuration as YAML.
    """

    def __init__(self, *arguments: Any, text: str, pointer: Path, **options: Any) -> None:
        # Lightning would write to the common folder of the loggers, and fail if it has such a file.
        super().__init__(*arguments, **(options | {"save_to_log_dir": False}))
        self._text, self._pointer = text, pointer

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write configuration and provenance on rank 0 before training; evaluations write nothing."""
        if stage != "fit":
            return
        if not self.already_saved:
            self._folder = run_folder(trainer, self.config.get("ckpt_path"))  # a broadcast
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write configuration and provenance."""

        def paths(stem: str) -> tuple[Path, Path]:
            return self._folder / f"{stem}.yaml", self._folder / f"{stem.replace('config', 'provenance', 1)}.json"

        stem = Path(self.config_filename).stem
        if not self.overwrite:
            stem = free_name(
                stem, lambda name: any(path.exists() for path in paths(name)) or not reserve(paths(name)[0])
            )
        config, origin = paths(stem)
        atomic_write_text(config, self._text)
        atomic_write_text(origin, json.dumps(provenance(), indent=2) + "\n")
        log_settings(trainer, _settings(self.config.as_dict()))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the pointer file on rank 0, unless the run saves no checkpoints."""
        if trainer.is_global_zero and trainer.checkpoint_callbacks:
            write_pointer(self._pointer, self._folder, trainer.loggers)


def _settings(config: dict[str, Any]) -> dict[str, bool | float | str]:
    """Return the few settings in which runs differ most."""
    model = dict(config["model"].get("init_args") or {})
    encoder = model.pop("encoder", None)
    parts = dict((encoder.get("init_args") if isinstance(encoder, dict) else None) or {})
    loss = model.pop("loss", None) or config["model"]
    name = loss if isinstance(loss, str) else saved_name(loss) if callable(loss) else _name(loss)
    settings = {"loss": name} | parts | model
    if settings.get("seed") is None:
        settings["seed"] = config["seed_everything"]
    if isinstance(encoder, dict) and "class_path" in encoder:
        settings["encoder"] = parts.get("backbone", _name(encoder))
    shown = {name: settings.get(name) for name in _SHOWN}
    return {name: value for name, value in shown.items() if isinstance(value, (bool, int, float, str))}


def _name(spec: dict[str, Any]) -> str:
    return str(spec["class_path"]).rpartition(".")[2]
