"""What a run needs beside Lightning's checkpoint to go on as if it had never stopped, and where it goes on."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from stepwise_lightning.errors import UserError
from stepwise_lightning.loggers import CHECKPOINTS, boards


def random_state() -> dict[str, Any]:
    """Return the state of this process's random number generators, as tensors, numbers and tuples."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    numpy = tuple(part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state())
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate(), "numpy": numpy}


def set_random_state(state: dict[str, Any]) -> None:
    """Let the generators go on from what :func:`random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])


def unwritten_metrics(trainer: L.Trainer) -> dict[str, float]:
    """Return what Lightning will send to the loggers as soon as the callbacks' hook that is running has ended.

    A checkpoint is written in such a hook, and a kill just after it would leave a gap.
    """
    connector = trainer._logger_connector
    in_batch = connector._first_loop_iter is not None
    if in_batch and (not connector.should_update_logs or trainer.fit_loop._should_accumulate()):
        return {}
    metrics = {name: float(value) for name, value in connector.metrics["log"].items() if isinstance(value, Tensor)}
    return metrics | {"epoch": trainer.current_epoch} if metrics else {}


def continue_events(trainer: L.Trainer, unwritten: dict[str, float]) -> None:
    """Let TensorBoard forget what came after the checkpoint, and write what did not come before it; on rank 0 alone.

    Readers drop all events from this step on that come before the mark set here.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    step = trainer.global_step
    for board in boards(trainer):
        board.flush()
        if unwritten:
            earlier = EventAccumulator(board.log_dir, size_guidance={"scalars": 0, "tensors": 1, "images": 1}).Reload()
            known = {tag for tag in earlier.Tags()["scalars"] if any(s.step == step - 1 for s in earlier.Scalars(tag))}
            for tag in unwritten.keys() - known:
                board.add_scalar(tag, unwritten[tag], step - 1)
        board.file_writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))


def continue_newest(config: Any) -> int | None:
    """Point the configuration of ``stepwise fit --ckpt_path last`` to the newest run of its name.

    That is the one with the highest version that has begun to train. It goes on in its own folder, from its newest
    checkpoint. Where there is none yet, a new run is started.

    Args:
        config: of ``fit``; ``ckpt_path`` and the logger's ``version`` are changed.

    Returns:
        The step that it goes on from, None if it starts anew.

    Raises:
        ValueError: the logger does not say where its runs lie, or a checkpoint cannot be read.

    """
    place: Any = getattr(config.trainer.logger, "init_args", None)
    if not all(hasattr(place, name) for name in ("save_dir", "name", "version")):
        raise UserError(
            "--ckpt_path last looks for runs where the logger writes them: configure one logger with save_dir and "
            "name, for example TensorBoardLogger, or give the path of a checkpoint"
        )
    runs = Path(place.save_dir, place.name or "")
    version = place.version if place.version is not None else _newest_version(runs)
    directory = runs / (version if isinstance(version, str) else f"version_{version}") / CHECKPOINTS
    saved = [(_step(path), path) for path in directory.glob("[!.]*.ckpt")]
    if not saved:
        rank_zero_info(f"no checkpoint in {runs if version is None else directory} yet: starting anew")
        config.ckpt_path = None
        return None
    step, path = max(saved)
    rank_zero_info(f"continuing {directory.parent} from step {step}")
    config.ckpt_path, place.version = str(path), version
    return step


def _newest_version(runs: Path) -> int | None:
    """Return the highest version that has begun to train: an evaluation leaves a folder without checkpoints."""
    names = [path.parent.name.removeprefix("version_") for path in runs.glob(f"version_*/{CHECKPOINTS}")]
    return max((int(name) for name in names if name.isdecimal()), default=None)


def _step(path: Path) -> int:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    except Exception as error:  # whatever torch and pickle make of foreign bytes
        raise UserError(f"{path} is no checkpoint that can be read: remove it to go on from another") from error
