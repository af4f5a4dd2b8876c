"""``ckpt_path="last"`` in Python: the checkpoints of ``LastCheckpoint``, which Lightning does not search for."""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.utilities import rank_zero_info

from stepwise_lightning.runs.folders import CHECKPOINTS, WITHOUT_LOGGER, newest_checkpoint_in, version_number
from stepwise_lightning.runs.loggers import folder_of


def search_for_last(kind: type) -> None:
    """Let ``ckpt_path="last"`` of a Trainer with a callback of this class find the callback's newest checkpoint.

    It is searched in the folder of the run; for a new Trainer without a logger, in the latest run that has checkpoints.
    There is no public hook: Lightning asks its own ``ModelCheckpoint`` and ``OnExceptionCheckpoint`` only.
    """
    parse = _CheckpointConnector._parse_ckpt_path

    @wraps(parse)
    def parse_ckpt_path(connector: Any, state_fn: Any, ckpt_path: Any, *arguments: Any, **options: Any) -> Any:
        if ckpt_path == "last":
            callback = next((each for each in connector.trainer.callbacks if isinstance(each, kind)), None)
            found = None if callback is None else _newest(connector.trainer, callback)
            ckpt_path = found or ckpt_path
            if found is None and connector.trainer.checkpoint_callbacks == [callback]:
                rank_zero_info("no checkpoint in the folder of this run yet: starting a new run")
                return None
        return parse(connector, state_fn, ckpt_path, *arguments, **options)

    _CheckpointConnector._parse_ckpt_path = parse_ckpt_path  # type: ignore[method-assign, assignment]


def _newest(trainer: L.Trainer, callback: Any) -> str | None:
    # The same on every rank: there is no process group yet.
    if hasattr(callback, "directory"):  # of an earlier fit
        runs = [callback.directory.parent]
    elif trainer.loggers:
        runs = [folder_of(trainer.loggers[0], trainer.default_root_dir)]
    else:
        folders = Path(trainer.default_root_dir, WITHOUT_LOGGER).glob(f"version_*/{CHECKPOINTS}")
        runs = sorted((folder.parent for folder in folders), key=version_number, reverse=True)
    return next((str(found[1]) for run in runs if (found := newest_checkpoint_in(run))), None)
