"""Options of callbacks, configurations that change only some callbacks, and callbacks for a user's module."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.utilities import rank_zero_info

from stepwise_lightning.callbacks.collapse_monitor import CollapseMonitor
from stepwise_lightning.callbacks.forecast_logger import ForecastLogger
from stepwise_lightning.callbacks.online_evaluation import REPRESENTATION
from stepwise_lightning.callbacks.spectrum_logger import SpectrumLogger
from stepwise_lightning.errors import UserError
from stepwise_lightning.features import has_forward

# prefixes of options such as --spectrum.num_points
OPTIONS = {
    "spectrum": "stepwise_lightning.SpectrumLogger",
    "forecast": "stepwise_lightning.ForecastLogger",
    "checkpoint": "stepwise_lightning.LastCheckpoint",
    "knn": "stepwise_lightning.OnlineKNN",
    "probe": "stepwise_lightning.OnlineLinearProbe",
}


def as_configurations(arguments: list[str]) -> list[str]:
    """Return command-line arguments in which options of callbacks are replaced by configurations.

    ``--spectrum.num_points 50`` becomes a ``--config`` with one callback and that argument. These configurations come
    after the files, which they override; ``--print_config`` follows, because it prints the preceding ones.

    Raises:
        ValueError: an option without a value.

    """
    others, configurations = list[str](), list[str]()
    rest = iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition("=")
        callback, _, name = option.removeprefix("--").partition(".")
        if not (option.startswith("--") and callback in OPTIONS and name):
            others.append(argument)
            continue
        text = value if equals else next(rest, None)
        if text is None:
            raise UserError(f"{option} needs a value")
        configurations.append(f"--config={json.dumps(_configuration(OPTIONS[callback], name, text))}")
    printing = [argument for argument in others if argument.startswith("--print_config")]
    return [argument for argument in others if argument not in printing] + configurations + printing


def _configuration(class_path: str, name: str, value: str) -> dict[str, Any]:
    callback = {"class_path": class_path, "init_args": {name: yaml.safe_load(value)}}
    return {"trainer": {"callbacks": [callback]}}


def with_merged_callbacks(arguments: list[str]) -> list[str]:
    """Return command-line arguments in which later configurations change only the callbacks that they name.

    A configuration with the callbacks of all files is inserted after the last one. The n-th callback of a class in
    a later file updates the arguments of the n-th callback of that class, or is appended. ``callbacks: null`` removes
    all.
    """
    merged, last, num_lists = None, 0, 0
    for index, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if index and arguments[index - 1] in ("--config", "-c"):
            value = argument
        elif not (equals and option == "--config"):
            continue
        trainer = _loaded(value).get("trainer")
        if isinstance(trainer, dict) and "callbacks" in trainer:
            changes, last, num_lists = trainer["callbacks"], index + 1, num_lists + 1
            merged = _merged(merged, changes) if isinstance(merged, list) and isinstance(changes, list) else changes
    if num_lists < 2:
        return arguments
    configuration = yaml.safe_dump({"trainer": {"callbacks": merged}}, sort_keys=False)
    return [*arguments[:last], f"--config={configuration}", *arguments[last:]]


def _loaded(configuration: str) -> dict[str, Any]:
    """Return a configuration, given as a path or as text; {} if it cannot be read, which the parser reports."""
    try:
        configuration = Path(configuration).read_text(encoding="utf-8")
    except (OSError, ValueError):  # a configuration as text
        pass
    try:
        loaded = yaml.safe_load(configuration)
    except yaml.YAMLError:
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _merged(callbacks: list[Any], changes: list[Any]) -> list[Any]:
    result, free = list(callbacks), list(range(len(callbacks)))
    for change in changes:
        index = next((index for index in free if _class_name(callbacks[index]) == _class_name(change)), None)
        if index is None:
            result.append(change)
        elif isinstance(change, dict):
            free.remove(index)
            before = callbacks[index] if isinstance(callbacks[index], dict) else {"class_path": callbacks[index]}
            settings = (before.get("init_args") or {}) | (change.get("init_args") or {})
            result[index] = before | {"init_args": settings}
    return result


def _class_name(callback: Any) -> str:
    # Classes of this package have several paths.
    path = callback.get("class_path") if isinstance(callback, dict) else callback
    return str(path).rpartition(".")[2]


def adapted(callbacks: list[Any], model: L.LightningModule) -> list[Any]:
    """Return configured callbacks without those that a user's module cannot have.

    The configurations of the package have to train any module. They name ``encoder.backbone``, and measure the output
    of ``forward``.
    """
    if type(model).__module__.startswith("stepwise_lightning."):
        return callbacks
    loggers, name = (
        [each for each in callbacks if isinstance(each, SpectrumLogger) and each.output],
        type(model).__name__,
    )
    if loggers and not has_forward(model):
        rank_zero_info(f"no spectra and no forecast: {name} has no forward(view)")
        loggers, kinds = [], (SpectrumLogger, CollapseMonitor, ForecastLogger)
        callbacks = [callback for callback in callbacks if not isinstance(callback, kinds)]
    if REPRESENTATION in dict(model.named_modules()):
        return callbacks
    dropped = [callback for callback in callbacks if getattr(callback, "watch", None) == REPRESENTATION]
    loggers = [each for each in loggers if REPRESENTATION in each.watch]
    for logger in loggers:
        logger.watch = tuple(watched for watched in logger.watch if watched != REPRESENTATION)
    if dropped or loggers:
        without = "".join(f", and there is no {type(callback).__name__}" for callback in dropped)
        rank_zero_info(f"{REPRESENTATION} is not watched{without}: {name} has no such submodule")
    return [callback for callback in callbacks if callback not in dropped]
