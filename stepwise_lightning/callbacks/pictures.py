"""The picture of a run, beside its ``spectrum.npz`` and in the loggers that show images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from stepwise_lightning.errors import UserError
from stepwise_lightning.files import atomic_write
from stepwise_lightning.spectrum.record import SpectrumRecord

__all__ = ["keep_picture"]

_LEAST = 10


def keep_picture(
    trainer: L.Trainer, record: SpectrumRecord, path: Path, name: str, due: Mapping[str, Sequence[float]]
) -> Path | None:
    """Draw the trajectories of a run that has ended, write them as PNG, and send them to W&B and MLflow.

    Args:
        trainer: whose loggers get it; TensorBoard has pictures of its own.
        record: of the run; from less than ten measurements nothing is drawn, since nothing would be seen.
        path: of the file.
        name: of the image in W&B, and of its folder in MLflow.
        due: by matrix, times at which modes were forecast to be learned, which are marked.

    Returns:
        The path, None where nothing is drawn.

    Raises:
        OSError: the file cannot be written.

    """
    if len(record) < _LEAST:
        return None
    from stepwise_lightning.plots import run_figure

    try:
        figure = run_figure(record, title="/".join(path.parent.parts[-2:]), due=due)
    except UserError as error:
        rank_zero_warn(f"no picture is drawn: {error}")
        return None
    atomic_write(path, lambda partial: figure.savefig(partial, dpi=130))
    for logger in trainer.loggers:
        _send(logger, path, f"{name}/trajectories")
    return path


def _send(logger: Any, path: Path, key: str) -> None:
    kinds = {base.__name__ for base in type(logger).__mro__}  # lightning's and pytorch_lightning's share no class
    if "WandbLogger" in kinds:
        logger.log_image(key=key, images=[str(path)])
    elif "MLFlowLogger" in kinds:
        logger.experiment.log_artifact(logger.run_id, str(path), key.rpartition("/")[0])
