"""``--ckpt_path last``: find and resume the latest run of a configuration.

Each ``stepwise fit`` run writes a pointer file when training starts. Its path follows from the configuration alone: the
``save_dir``, class and name of the first logger, or ``default_root_dir`` without a logger. It holds the folder of the
run and the version of each logger.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from jsonargparse import Namespace
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from stepwise_lightning.errors import UserError
from stepwise_lightning.files import atomic_write_text, local_path
from stepwise_lightning.runs.folders import (
    CHECKPOINTS,
    WITHOUT_LOGGER,
    free_name,
    newest_checkpoint_in,
    version_number,
)
from stepwise_lightning.runs.loggers import logger_kind

_TENSORBOARD = "lightning.pytorch.loggers.TensorBoardLogger"


@dataclass
class _Run:
    folder: Path
    versions: Sequence[int | str]  # of each logger


def pointer_file(config: Any) -> Path:
    """Return the path of the pointer file of a configuration of ``stepwise fit``."""
    loggers = _loggers(config)
    if not loggers:
        return _parent(config) / ".latest.json"
    arguments, class_name = _arguments(loggers[0]), loggers[0].class_path.rpartition(".")[2]
    parts = [class_name, _name(arguments)]
    if (version := _configured_version(arguments)) is not None:
        parts.append(str(version))
    return _save_dir(config, loggers[0]) / f".latest_{quote('_'.join(parts), safe='')}.json"


def write_pointer(path: Path, folder: Path, loggers: Sequence[Any]) -> None:
    """Write a pointer to the run in ``folder``; relative, as long as the folder is below that of the pointer file."""
    folder, parent = folder.absolute(), path.absolute().parent
    relative = folder.relative_to(parent) if folder.is_relative_to(parent) else folder
    versions = [logger.version if isinstance(logger.version, int) else str(logger.version) for logger in loggers]
    atomic_write_text(path, json.dumps({"folder": str(relative), "versions": versions}) + "\n")


def resume_latest(config: Any) -> int | None:
    """Change the configuration of ``stepwise fit --ckpt_path last``: resume the latest run, or start a new one.

    The run continues in its folder from its newest checkpoint, and as the same run of W&B or MLflow. A logger whose
    version cannot be set continues in a new folder. Without a checkpoint in the latest run, a new run starts. Returns
    the step of the checkpoint, None for a new run.
    """
    run = _latest_run(config)
    saved = newest_checkpoint_in(run.folder) if run else None
    if run is None or saved is None:
        rank_zero_info(f"no checkpoint in {run.folder if run else _parent(config)} yet: starting a new run")
        config.ckpt_path = None
        return None
    step, path = saved
    config.ckpt_path = str(path.absolute())
    loggers = _loggers(config)
    in_place = [_set_version(logger, version) for logger, version in zip(loggers, run.versions, strict=False)]
    elsewhere = "" if not loggers or in_place[0] else f", in a new folder: {loggers[0].class_path} takes no version"
    rank_zero_info(f"resuming {run.folder} from step {step}{elsewhere}")
    if loggers and config.trainer.logger in (None, True):
        config.trainer.logger = loggers[0]
    if not config.trainer.fast_dev_run and getattr(rank_zero_only, "rank", 0) == 0:
        for logger in loggers:
            _keep_metrics(config, logger, step)
    return step


def newest_checkpoint(config: Any) -> str:
    """Return the path of the newest checkpoint of a configuration's latest run, without changing anything."""
    run = _latest_run(config)
    saved = newest_checkpoint_in(run.folder) if run else None
    if saved is None:
        place = run.folder if run else _parent(config)
        raise UserError(f"no checkpoint in {place} yet: train first, or leave --ckpt_path out")
    return str(saved[1].absolute())


def _latest_run(config: Any) -> _Run | None:
    pointer = pointer_file(config)
    try:
        entry = json.loads(pointer.read_text(encoding="utf-8"))
        run = _Run(pointer.parent / entry["folder"], entry["versions"])
    except (OSError, ValueError, KeyError, TypeError):  # no pointer file, or a damaged one
        return _run_without_pointer(config)
    return run if run.folder.is_dir() else _run_without_pointer(config)  # it may have been deleted


def _run_without_pointer(config: Any) -> _Run | None:
    """Return the latest run that has a checkpoint and no pointer file, such as a run of an earlier version.

    TensorBoard's and CSV runs, and runs without a logger, have numbers. Runs of other loggers are refused.
    """
    loggers, parent = _loggers(config), _parent(config)
    arguments = _arguments(loggers[0]) if loggers else {}
    below, version = arguments.get("sub_dir") or "", _configured_version(arguments)
    if loggers and logger_kind(_class_of(loggers[0])) not in ("TensorBoardLogger", "CSVLogger"):
        _refuse_without_pointer(config, loggers[0])
        return None
    if version is None:
        folders = sorted(parent.glob("version_*"), key=version_number, reverse=True)
    else:
        folders = [parent / _version_folder(version)]
    for folder in folders:
        if any((folder / below / CHECKPOINTS).glob("[!.]*.ckpt")):
            return _Run(folder / below, [version_number(folder)] if loggers else [])
    return None


def _refuse_without_pointer(config: Any, logger: Any) -> None:
    """Raise if runs of this logger have checkpoints; which one is the latest, and its version, is not recorded."""
    folders = [_parent(config)]
    if logger_kind(_class_of(logger)) == "MLFlowLogger":  # folders are called by the id of the experiment
        stores = _save_dir(config, logger).glob("*/meta.yaml")
        name = _name(_arguments(logger))
        folders = [path.parent for path in stores if yaml.safe_load(path.read_text(encoding="utf-8"))["name"] == name]
    saved = [path for folder in folders for path in folder.glob(f"*/{CHECKPOINTS}/[!.]*.ckpt")]
    if saved:
        newest = max(saved, key=lambda path: path.stat().st_mtime_ns)
        raise UserError(
            f"--ckpt_path last: no record of the latest run in {_parent(config)}, whose runs are of an earlier version;"
            f" to resume the newest checkpoint, give --ckpt_path {newest} (its run is {newest.parent.parent.name})"
        )


def _loggers(config: Any) -> list[Any]:
    """Return the configured loggers, or Lightning's default logger."""
    loggers = config.trainer.logger
    if loggers in (None, True):
        arguments = Namespace(save_dir=str(_root(config)), name="lightning_logs", version=None)
        return [Namespace(class_path=_TENSORBOARD, init_args=arguments)]
    if not loggers:
        return []
    return list(loggers) if isinstance(loggers, (list, tuple)) else [loggers]


def _arguments(logger: Any) -> dict[str, Any]:
    arguments = getattr(logger, "init_args", None)
    return {} if arguments is None else arguments.as_dict()


def _class_of(logger: Any) -> type:
    module, _, name = logger.class_path.rpartition(".")
    return getattr(import_module(module), name)


def _root(config: Any) -> Path:
    return local_path(config.trainer.default_root_dir or ".").expanduser()


def _save_dir(config: Any, logger: Any) -> Path:
    arguments = _arguments(logger)
    if address := arguments.get("tracking_uri"):  # of MLflow
        return Path(address.removeprefix("file:")) if address.startswith("file:") else _root(config)
    folder = arguments.get("save_dir") or str(_root(config))
    if logger_kind(_class_of(logger)) == "CSVLogger":  # the only one that creates a folder "~"
        return local_path(folder)
    return local_path(os.path.expandvars(folder)).expanduser()


def _name(arguments: dict[str, Any]) -> str:
    """Return the name under which a logger groups runs: W&B's project, MLflow's experiment, the name of others."""
    return next((arguments[key] for key in ("project", "experiment_name", "name") if arguments.get(key)), "")


def _parent(config: Any) -> Path:
    """Return the folder of the runs, as far as the configuration names it."""
    loggers = _loggers(config)
    return _save_dir(config, loggers[0]) / _name(_arguments(loggers[0])) if loggers else _root(config) / WITHOUT_LOGGER


def _configured_version(arguments: dict[str, Any]) -> int | str | None:
    return next((arguments[key] for key in ("version", "id", "run_id") if arguments.get(key) is not None), None)


def _version_folder(version: int | str) -> str:
    return f"version_{version}" if isinstance(version, int) else version


def _set_version(logger: Any, version: int | str) -> bool:
    """Set the version of a logger unless the configuration has one; return False if it has no such argument."""
    arguments = getattr(logger, "init_args", None) or {}
    key = next((key for key in ("run_id", "version") if key in arguments), None)
    if key is not None and _configured_version(_arguments(logger)) is None:
        arguments[key] = version
    return key is not None


def _keep_metrics(config: Any, logger: Any, step: int) -> None:
    """Rename the ``metrics.csv`` of a resumed CSVLogger, which would delete it."""
    version = _configured_version(_arguments(logger))
    if logger_kind(_class_of(logger)) != "CSVLogger" or version is None:
        return
    warnings.filterwarnings("ignore", "Experiment logs directory .* exists and is not empty")
    folder = _save_dir(config, logger) / _name(_arguments(logger)) / _version_folder(version)
    if (folder / "metrics.csv").is_file():
        name = free_name(f"metrics_to_step_{step}", lambda name: (folder / f"{name}.csv").exists())
        (folder / "metrics.csv").rename(folder / f"{name}.csv")
