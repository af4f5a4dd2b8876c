"""Saved runs: checkpoint, configuration, and the encoder rebuilt from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from stepwise_lightning.errors import NotFoundError, UserError, condensed, reason
from stepwise_lightning.runs.folders import CHECKPOINTS, checkpoints_in
from stepwise_lightning.runs.moved_classes import with_current_classes
from stepwise_lightning.seeding import checked_seed, isolated_rng

_PREFIX = "encoder."


def configured_encoder(checkpoint: str | Path) -> nn.Module:
    """Return the untrained encoder that the configuration of a checkpoint's run describes."""
    config = configuration_of(Path(checkpoint))
    name, settings = class_and_arguments(config, "model")
    if "encoder" not in settings:
        raise UserError(f"the model of this run, {name}, has no argument 'encoder': use its own load_from_checkpoint")
    seed = config.get("seed_everything")
    if not isinstance(seed, int) or isinstance(seed, bool):
        return instantiate(nn.Module, settings["encoder"])
    with isolated_rng(checked_seed(seed)):  # of the initial weights
        return instantiate(nn.Module, settings["encoder"])


def configured_loss(checkpoint: str | Path) -> Callable[..., Any] | None:
    """Return the loss in the configuration of a checkpoint's run, None without a configuration or a loss."""
    try:
        _, settings = class_and_arguments(configuration_of(Path(checkpoint)), "model")
    except NotFoundError:
        return None
    loss = settings.get("loss")
    return None if loss is None else instantiate(Callable[..., Any], loss)


def load_weights(encoder: nn.Module, checkpoint: Path) -> None:
    """Load the weights of the encoder in a checkpoint."""
    weights = saved_checkpoint(checkpoint)["state_dict"]
    encoder_weights = {
        name.removeprefix(_PREFIX): values for name, values in weights.items() if name.startswith(_PREFIX)
    }
    try:
        encoder.load_state_dict(encoder_weights)
    except RuntimeError as error:
        raise UserError(
            f"{str(checkpoint)!r} does not fit the encoder in the configuration of its run ({reason(error)}): are both "
            "files of one run?"
        ) from error


def checkpoint_of(run: str | Path) -> Path:
    """Return the newest checkpoint in the folder of a run; the path of a checkpoint is returned unchanged."""
    path = Path(run)
    if path.is_file():
        return path
    if not path.is_dir():
        raise NotFoundError(f"no run {str(run)!r}: give the folder of a run, runs/NAME/VERSION, or a checkpoint in it")
    saved = checkpoints_in(path)
    if not saved:
        versions = sorted(str(folder.parent) for folder in path.glob(f"*/{CHECKPOINTS}") if any(folder.glob("*.ckpt")))
        remedy = f"; give one of its runs, such as {versions[-1]!r}" if versions else ""
        raise NotFoundError(f"no checkpoint in {str(path / CHECKPOINTS)!r}{remedy}")
    return saved[-1]


def saved_checkpoint(checkpoint: str | Path) -> dict[str, Any]:
    """Load a checkpoint as data: tensors and plain values, which name nothing to import or run."""
    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise many types for damaged files
        raise UserError(f"the checkpoint {str(checkpoint)!r} cannot be read ({reason(error)})") from error
    if not isinstance(saved, dict) or not isinstance(saved.get("state_dict"), dict):
        raise UserError(f"{str(checkpoint)!r} is not a Lightning checkpoint: it has no state_dict")
    return saved


def configuration_of(checkpoint: Path) -> dict[str, Any]:
    """Return the configuration of a checkpoint's run: ``config-v1.yaml`` for ``last-v1.ckpt``, if it exists."""
    folder = checkpoint.absolute().parent.parent
    suffix = checkpoint.stem.removeprefix("last")
    paths = [folder / f"config{suffix}.yaml", folder / "config.yaml"]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise NotFoundError(
            f"no config.yaml in {str(folder)!r}, the folder of the run of {str(checkpoint)!r}: `stepwise fit` "
            "writes one; or build the encoder, and pass it to load_from_checkpoint(path, encoder=…)"
        )
    try:
        configuration = yaml.safe_load(with_current_classes(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{str(path)!r} cannot be read as a configuration ({reason(error)})") from error
    if not isinstance(configuration, dict):
        raise UserError(f"{str(path)!r} is not the configuration of a run")
    return configuration


def class_and_arguments(config: dict[str, Any], part: str) -> tuple[str, dict[str, Any]]:
    """Return the class path and the arguments of ``model`` or ``data`` in a configuration, '' and {} if absent."""
    spec = config.get(part)
    if not isinstance(spec, dict):
        return str(spec or ""), {}
    arguments = spec.get("init_args")
    return str(spec.get("class_path") or ""), arguments if isinstance(arguments, dict) else {}


def instantiate(kind: Any, settings: Any) -> Any:
    """Return an object of a type, as a part of a configuration describes it."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--part", type=kind, required=True)
    try:
        return parser.instantiate_classes(parser.parse_object({"part": settings})).part
    except ArgumentError as error:
        raise UserError(f"the configuration of the run cannot be rebuilt: {condensed(str(error))}") from error
