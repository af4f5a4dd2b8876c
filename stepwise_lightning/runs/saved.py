"""Saved runs: checkpoint, configuration, and the encoder that they describe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from stepwise_lightning.errors import NotFoundError, UserError, condensed, reason
from stepwise_lightning.runs.folders import CHECKPOINTS

__all__ = ["checkpoint_of", "configuration_of", "configured_encoder", "instantiate", "saved_checkpoint"]


def configured_encoder(checkpoint: str | Path) -> nn.Module:
    """Return the encoder of a checkpoint's run as it was before training, from the configuration of that run.

    Raises:
        FileNotFoundError: there is no ``config.yaml`` in the folder above the checkpoint's.
        ValueError: it cannot be read, or configures no encoder.

    """
    model = configuration_of(Path(checkpoint)).get("model") or {}
    settings = model.get("init_args") if isinstance(model, dict) else None
    if not isinstance(settings, dict) or "encoder" not in settings:
        name = model.get("class_path") if isinstance(model, dict) else model
        raise UserError(
            f"the model of this run, {name}, has no argument 'encoder' to rebuild: use its own load_from_checkpoint"
        )
    return instantiate(nn.Module, settings["encoder"])


def checkpoint_of(run: str | Path) -> Path:
    """Return the newest checkpoint of a run's folder; a checkpoint itself as it is."""
    path = Path(run)
    if path.is_file():
        return path
    if not path.is_dir():
        raise NotFoundError(f"no run {str(run)!r}: give the folder of a run, runs/NAME/VERSION, or a checkpoint in it")
    saved = list((path / CHECKPOINTS).glob("[!.]*.ckpt"))
    if not saved:
        versions = sorted(str(place.parent) for place in path.glob(f"*/{CHECKPOINTS}") if any(place.glob("*.ckpt")))
        remedy = f"; give one of its runs, such as {versions[-1]!r}" if versions else ""
        raise NotFoundError(f"no checkpoint in {str(path / CHECKPOINTS)!r}{remedy}")
    return max(saved, key=lambda file: file.stat().st_mtime_ns)


def saved_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """Load a checkpoint with ``weights_only=True``."""
    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch and pickle make of foreign bytes
        raise UserError(f"{str(checkpoint)!r} is no checkpoint that can be read ({reason(error)})") from error
    if not isinstance(saved, dict) or not isinstance(saved.get("state_dict"), dict):
        raise UserError(f"{str(checkpoint)!r} is no checkpoint of Lightning's: it has no state_dict")
    return saved


def configuration_of(checkpoint: Path) -> dict[str, Any]:
    """Return the configuration beside a checkpoint: of ``last-v1.ckpt`` ``config-v1.yaml``, where there is one."""
    folder = checkpoint.absolute().parent.parent
    suffix = checkpoint.stem.removeprefix("last")
    paths = [folder / f"config{suffix}.yaml", folder / "config.yaml"]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise NotFoundError(
            f"no config.yaml in {str(folder)!r}, the folder of the run that {str(checkpoint)!r} is of: `stepwise fit` "
            "writes one; or build the encoder, and give it to load_from_checkpoint(path, encoder=…)"
        )
    try:
        configuration = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{str(path)!r} cannot be read as a configuration ({reason(error)})") from error
    if not isinstance(configuration, dict):
        raise UserError(f"{str(path)!r} is no configuration of a run")
    return configuration


def instantiate(kind: type, settings: Any) -> Any:
    """Return the object that a part of a configuration stands for."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "part", required=True)
    try:
        return parser.instantiate_classes(parser.parse_object({"part": settings})).part
    except ArgumentError as error:
        raise UserError(f"the configuration of the run cannot be rebuilt: {condensed(str(error))}") from error
