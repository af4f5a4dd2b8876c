"""Diagnosis of a run from its folder: record, configuration, checkpoint and data."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from stepwise_lightning.callbacks.spectrum_logger import records_in
from stepwise_lightning.errors import NotFoundError, UserError, reason
from stepwise_lightning.forecasts.diagnose import GIVE, diagnose
from stepwise_lightning.forecasts.diagnosis import Diagnosis
from stepwise_lightning.forecasts.simulate import NUM_PAIRS, unseen_batches
from stepwise_lightning.runs.folders import CHECKPOINTS
from stepwise_lightning.runs.saved import (
    checkpoint_of,
    class_and_arguments,
    configuration_of,
    instantiate,
    saved_checkpoint,
)
from stepwise_lightning.seeding import checked_seed, isolated_rng
from stepwise_lightning.spectrum.record import SpectrumRecord

_FAILED = ("fell_back", "diverged")
_NO_LOSS = 5  # rank of a column


def diagnose_run(
    run: str | Path,
    loss: str | Callable[[Tensor, Tensor], Tensor] | None = None,
    root: str | None = None,
    num_feature_pairs: int = NUM_PAIRS,
    **options: Any,
) -> Diagnosis:
    """Return the diagnosis of a finished or running training.

    Module and data are rebuilt from ``config.yaml``; the weights are those of the newest checkpoint, and the initial
    ones without a checkpoint, or if training has diverged or fallen back. If a part cannot be rebuilt, the diagnosis is
    made without it, and :attr:`Diagnosis.missing` has the reason.

    Args:
        run: folder of a run, ``runs/NAME/VERSION``, a checkpoint in it, or a file of its record, ``spectrum.npz``.
        loss: of a module of another package, see :func:`stepwise_lightning.diagnose`.
        root: folder of ``cifar10`` and ``stl10``; None for the setting of the run.
        num_feature_pairs: number of pairs whose features are used.
        options: other arguments of :func:`stepwise_lightning.diagnose`, instead of those in the configuration.

    Raises:
        FileNotFoundError: there is no run, or it has no record.
        ValueError: a damaged file.

    """
    path = Path(run)
    try:
        checkpoint: Path | None = None if path.suffix == ".npz" else checkpoint_of(path)
    except NotFoundError:
        if not path.is_dir():
            raise
        checkpoint = None
    saved: dict[str, Any] = {}
    missing: list[str] = []
    try:
        saved = {} if checkpoint is None else saved_checkpoint(checkpoint)
    except UserError as error:
        if path.is_file():
            raise UserError(
                f"{error}: give a folder of a run, a checkpoint in it, its spectrum.npz or a .csv"
            ) from error
        missing += [str(error)]
    folder = path if path.is_dir() else path.parent if checkpoint is None else checkpoint.parent.parent
    record = _record(path, folder, saved)
    module = batches = None
    options |= {"loss": loss, "num_feature_pairs": num_feature_pairs}
    try:
        config = configuration_of(checkpoint or folder / CHECKPOINTS / "last.ckpt")
        options = _options(config) | {name: value for name, value in options.items() if value is not None}
        module = _module(config)
        batches = _batches(config, root)
    except Exception as error:  # any class of a user may fail
        missing += [f"growth rates are not known ({reason(error)})"]
    result = diagnose(record, module, **options)
    if module is not None and batches is not None:
        start = 0
        if saved and result.verdict not in _FAILED:
            module.load_state_dict(saved["state_dict"])
            start = saved["global_step"]
        result = diagnose(record, module, batches, start=start, **options)
    unknown = result.missing.removeprefix(GIVE).removeprefix("; ")
    return replace(result, missing="; ".join(text for text in (*missing, unknown) if text))


def _record(path: Path, folder: Path, saved: dict[str, Any]) -> SpectrumRecord:
    if path.is_file() and saved:  # up to this checkpoint
        records = records_in(saved)
        return records[0] if records else SpectrumRecord.load(folder)
    if path.is_dir() and not (folder / "spectrum.npz").is_file() and (records := records_in(saved)):
        return records[0]
    return SpectrumRecord.load(path)


def _options(config: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``diagnose`` that a configuration determines."""
    trainer = config.get("trainer")
    trainer = trainer if isinstance(trainer, dict) else {}
    model, data = (class_and_arguments(config, part)[1] for part in ("model", "data"))
    max_steps, size, precision = trainer.get("max_steps"), data.get("global_batch_size"), trainer.get("precision")
    return {
        "max_steps": max_steps if isinstance(max_steps, int) and max_steps > 0 else None,
        "num_pairs": size if isinstance(size, int) and size > 0 else None,
        "precision": str(precision or "32-true"),
    }


def _module(config: dict[str, Any]) -> L.LightningModule:
    """Return the module with its initial weights."""
    if not isinstance(config.get("model"), dict):
        raise UserError("the configuration has no model")
    seed = config.get("seed_everything")
    with isolated_rng(checked_seed(seed if isinstance(seed, int) and not isinstance(seed, bool) else 0)):
        return instantiate(L.LightningModule, config["model"])


def _batches(config: dict[str, Any], root: str | None) -> Iterable[Any]:
    """Return batches of the data of a run."""
    if not isinstance(config.get("data"), dict):
        raise UserError("the configuration has no data")
    settings = dict(config["data"])
    if root is not None:
        settings["init_args"] = {**settings.get("init_args", {}), "root": root}
    data = instantiate(L.LightningDataModule, settings)
    data.setup("fit")
    return unseen_batches(data)


def read_losses(path: str) -> tuple[list[float], int]:
    """Return the losses in a CSV file, and the last step: of its column ``step``, or the number of the last loss.

    The losses are in the column ``loss``; or one whose name ends in it, preferably with ``train``; or TensorBoard's
    ``Value``; or the only one.

    Raises:
        ValueError: the file cannot be read, or has no such column.

    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        remedy = "give a .csv file with a column 'loss'"
        raise UserError(f"{path} cannot be read as a table of losses ({reason(error)}): {remedy}") from error
    names = [name.strip().lower() for name in rows[0]] if rows else []
    start = 1
    if len(names) == 1:
        column, start = 0, int(not _is_number(names[0]))
    else:
        column = min(range(len(names)), key=lambda index: _rank(names[index]), default=0)
        if not names or _rank(names[column]) == _NO_LOSS:
            columns = ", ".join(rows[0]) if rows else "no columns"
            raise UserError(f"{path} has no column 'loss', but {columns}: rename the column of the loss")
    cells = [
        (line, row) for line, row in enumerate(rows[start:], start + 1) if "".join(row[column : column + 1]).strip()
    ]
    for line, row in cells:
        if not _is_number(row[column]):
            raise UserError(f"line {line} of {path} has the loss {row[column]!r}: give a number, or leave it empty")
    losses, last = [float(row[column]) for _, row in cells], len(cells) - 1
    if "step" in names and cells and _is_number(step := "".join(cells[-1][1][names.index("step") :][:1])):
        last = int(float(step))
    return losses, last


def _rank(name: str) -> int:
    """Return the rank of a column of losses by its name; 0 is best."""
    if not re.search(r"loss(_epoch|_step)?$", name):
        return _NO_LOSS - (name == "value")
    return 0 if name == "loss" else 1 if "train" in name else 3 if re.match("val|test", name) else 2


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
