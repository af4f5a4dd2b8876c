"""How configurations and options change callbacks: those that they do not name stay as they are."""

from __future__ import annotations

import json
from typing import Any

import yaml

from stepwise_lightning.errors import UserError

__all__ = ["OPTIONS", "as_configurations", "merged"]

# What the callbacks of this package are called in options such as --spectrum.num_points.
OPTIONS = {
    "spectrum": "stepwise_lightning.SpectrumLogger",
    "forecast": "stepwise_lightning.ForecastLogger",
    "checkpoint": "stepwise_lightning.LastCheckpoint",
    "knn": "stepwise_lightning.OnlineKNN",
    "probe": "stepwise_lightning.OnlineLinearProbe",
}


def as_configurations(arguments: list[str]) -> list[str]:
    """Return the arguments of ``stepwise`` with options of callbacks written as configurations.

    ``--spectrum.num_points 50`` becomes a configuration of one callback, whose class has that argument. They come last,
    as options have the last word.

    Raises:
        ValueError: an option without a value.

    """
    others, written = list[str](), list[str]()
    rest = iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition("=")
        callback, _, name = option.removeprefix("--").partition(".")
        if not (option.startswith("--") and callback in OPTIONS and name):
            others.append(argument)
            continue
        given = value if equals else next(rest, None)
        if given is None:
            raise UserError(f"{option} needs a value")
        written.append(f"--config={json.dumps(_configuration(OPTIONS[callback], name, given))}")
    return others + written


def _configuration(class_path: str, name: str, value: str) -> dict[str, Any]:
    callback = {"class_path": class_path, "init_args": {name: yaml.safe_load(value)}}
    return {"trainer": {"callbacks": [callback]}}


def merged(before: list[Any], changes: list[Any]) -> list[Any]:
    """Return callbacks with changes: each changes the arguments of the one of its class, or is added.

    Of several of one class the first change is that of the first, and so on.
    """
    result, free = list(before), list(range(len(before)))
    for change in changes:
        same = next((index for index in free if _class_name(before[index]) == _class_name(change)), None)
        if same is None:
            result.append(change)
        else:
            free.remove(same)
            result[same] = _changed(before[same], change)
    return result


def _class_name(callback: Any) -> str:
    # A class of this package goes by several paths.
    return callback["class_path"].rpartition(".")[2]


def _changed(callback: Any, change: Any) -> Any:
    changed = callback.clone()
    for name, value in (change.get("init_args") or {}).items():
        changed[f"init_args.{name}"] = value
    return changed
