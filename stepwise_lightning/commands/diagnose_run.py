"""Diagnosis of a run from its folder: record, configuration, checkpoint and data."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from stepwise_lightning.callbacks.spectrum_logger import records_in
from stepwise_lightning.errors import NotFoundError, UserError, reason
from stepwise_lightning.forecasts.diagnose import diagnose
from stepwise_lightning.forecasts.diagnosis import Diagnosis
from stepwise_lightning.forecasts.simulate import NUM_PAIRS, unseen_batches
from stepwise_lightning.modules import JointEmbedding
from stepwise_lightning.runs.folders import CHECKPOINTS
from stepwise_lightning.runs.saved import checkpoint_of, configuration_of, instantiate, saved_checkpoint
from stepwise_lightning.seeding import checked_seed, isolated_rng
from stepwise_lightning.spectrum.record import SpectrumRecord

_FAILED = ("fell_back", "diverged")


def diagnose_run(
    run: str | Path,
    loss: str | Callable[[Tensor, Tensor], Tensor] | None = None,
    root: str | None = None,
    num_pairs: int = NUM_PAIRS,
) -> Diagnosis:
    """Return the diagnosis of a finished or running training.

    Module and data are rebuilt from ``config.yaml``; the weights are those of the newest checkpoint, and the initial
    ones without a checkpoint, or if training has diverged or fallen back. Without a configuration or its data the
    diagnosis is that of the record.

    Args:
        run: folder of a run, ``runs/NAME/VERSION``, a checkpoint in it, or a file of its record, ``spectrum.npz``.
        loss: of a module of another package, see :func:`stepwise_lightning.diagnose`.
        root: folder of ``cifar10`` and ``stl10``; None for the setting of the run.
        num_pairs: number of pairs whose features are used.

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
    saved = {} if checkpoint is None else saved_checkpoint(checkpoint)
    folder = path if path.is_dir() else path.parent if checkpoint is None else checkpoint.parent.parent
    record = _record(path, folder, saved)
    try:
        config = configuration_of(checkpoint or folder / CHECKPOINTS / "last.ckpt")
        module, batches, options = _rebuilt(config, root)
    except Exception as error:  # any class of a user may fail
        result = diagnose(record, loss=loss)
        return replace(result, missing=f"growth rates are not known ({reason(error)})")
    options |= {"loss": loss, "num_feature_pairs": num_pairs}
    first = diagnose(record, module, **options)
    if saved and first.verdict not in _FAILED:
        module.load_state_dict(saved["state_dict"])
        return diagnose(record, module, batches, start=saved["global_step"], **options)
    return diagnose(record, module, batches, start=0, **options)


def _record(path: Path, folder: Path, saved: dict[str, Any]) -> SpectrumRecord:
    if path.is_file() and saved:  # up to this checkpoint
        records = records_in(saved)
        return records[0] if records else SpectrumRecord.load(folder)
    if path.is_dir() and not (folder / "spectrum.npz").is_file() and (records := records_in(saved)):
        return records[0]
    return SpectrumRecord.load(path)


def _rebuilt(config: dict[str, Any], root: str | None) -> tuple[L.LightningModule, Any, dict[str, Any]]:
    """Return the module with its initial weights, batches of its data, and arguments of ``diagnose``."""
    seed = config.get("seed_everything")
    with isolated_rng(checked_seed(seed if isinstance(seed, int) and not isinstance(seed, bool) else 0)):
        module = instantiate(L.LightningModule, config["model"])
    if not isinstance(config.get("data"), dict):
        raise UserError("the configuration has no data")
    settings = dict(config["data"])
    if root is not None:
        settings["init_args"] = {**settings.get("init_args", {}), "root": root}
    data = instantiate(L.LightningDataModule, settings)
    data.setup("fit")
    trainer = config.get("trainer") or {}
    max_steps = trainer.get("max_steps", -1)
    precision = trainer.get("precision")
    decay = getattr(module, "hparams", {}).get("weight_decay") if isinstance(module, JointEmbedding) else None
    options = {
        "max_steps": max_steps if isinstance(max_steps, int) and max_steps > 0 else None,
        "precision": None
        if precision is None and not isinstance(module, JointEmbedding)
        else str(precision or "32-true"),
        "weight_decay": decay,
        "num_pairs": getattr(data, "hparams", {}).get("global_batch_size"),
    }
    return module, unseen_batches(data), options


def read_losses(path: str) -> list[float]:
    """Return the losses in a CSV file: its column ``loss``, or the first column whose name ends in it, or its only one.

    Raises:
        ValueError: the file cannot be read, or has no such column.

    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a table of losses ({reason(error)})") from error
    names = rows[0] if rows else []
    column = next((index for index, name in enumerate(names) if name == "loss"), None)
    if column is None:
        column = next((index for index, name in enumerate(names) if name.endswith("loss")), None)
    start = 1
    if column is None and len(names) == 1:
        column, start = 0, int(not _is_number(names[0]))
    if column is None:
        raise UserError(f"{path} has no column 'loss': name it so, or give one number in each line")
    cells = [row[column] for row in rows[start:] if column < len(row) and row[column].strip()]
    if not all(_is_number(cell) for cell in cells):
        raise UserError(f"the losses in {path} must be numbers")
    return [float(cell) for cell in cells]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
