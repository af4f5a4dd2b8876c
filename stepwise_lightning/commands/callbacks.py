"""Options of callbacks, configurations that change only some callbacks, and callbacks for a user's module."""

from __future__ import annotations

import json
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


def merged(callbacks: list[Any], changes: list[Any]) -> list[Any]:
    """Return configured callbacks with changes: a change updates the arguments of the callback of its class.

    The n-th change of a class applies to the n-th callback of that class; without such a callback it is appended.
    """
    result, free = list(callbacks), list(range(len(callbacks)))
    for change in changes:
        index = next((index for index in free if _class_name(callbacks[index]) == _class_name(change)), None)
        if index is None:
            result.append(change)
        else:
            free.remove(index)
            result[index] = _updated(callbacks[index], change)
    return result


def _class_name(callback: Any) -> str:
    # Classes of this package have several paths.
    return callback["class_path"].rpartition(".")[2]


def _updated(callback: Any, change: Any) -> Any:
    updated = callback.clone()
    for name, value in (change.get("init_args") or {}).items():
        updated[f"init_args.{name}"] = value
    return updated


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
