"""When a run is saved, and how: whole, and in time when it is told to stop."""

from __future__ import annotations

import io
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info

from stepwise_lightning.collectives import all_gather_objects
from stepwise_lightning.errors import UserError
from stepwise_lightning.files import atomic_write
from stepwise_lightning.loggers import CHECKPOINTS, run_folder
from stepwise_lightning.runs.resume import (
    continue_events,
    random_state,
    set_random_state,
    unwritten_metrics,
)
from stepwise_lightning.signals import EX_TEMPFAIL, STOP_SIGNALS

_KEY = "stepwise_lightning"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside the old one and then moves it there: ``Trainer(plugins=[AtomicCheckpointIO()])``.

    Lightning's own way writes to the temporary folder first, and copies from there where that is another file system:
    a kill leaves half a file in the old one's place.

    Raises:
        OSError: it cannot be written; the old one is as it was.

    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path``; to other places than the file system, as Lightning does."""
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()  # torch's own writer does not say why it failed
        torch.save(checkpoint, buffer)
        atomic_write(Path(path), lambda partial: partial.write_bytes(buffer.getbuffer()))


class LastCheckpoint(Checkpoint):
    """Keep ``checkpoints/last.ckpt`` of a run up to date, so that it can be continued exactly.

    It is saved every so many optimiser steps, when training ends, and when SIGTERM or SIGUSR1 says that it must end
    (SLURM and other schedulers send them before they kill), or SIGINT (Ctrl-C; a second one ends it at once): then at
    the end of the step under way on all processes, whichever of them got the signal, before they exit with the status
    75. Where that step is the last one of an epoch, validation and one more step come first.

    Besides what Lightning saves it keeps the state of the random number generators of each process. When training is
    resumed, events that TensorBoard got after the checkpoint are marked as void.

    Args:
        every_n_train_steps: how often; what is lost by a kill without warning is at most so many steps.

    Raises:
        ValueError: ``every_n_train_steps`` is below 1, or a checkpoint of another number of processes.

    """

    def __init__(self, every_n_train_steps: int = 100) -> None:
        if every_n_train_steps < 1:
            raise UserError(f"every_n_train_steps must be at least 1, got {every_n_train_steps}")
        self.every_n_train_steps = every_n_train_steps
        self._signal = 0
        self._restored: dict[str, Any] = {}

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning leaves out; what the loggers hold reaches their files before the checkpoint does."""
        for logger in trainer.loggers:
            logger.save()
        checkpoint[_KEY] = {"random": all_gather_objects(random_state()), "unwritten": unwritten_metrics(trainer)}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep it until training starts."""
        self._restored = checkpoint.get(_KEY, {}) if trainer.state.fn == "fit" else {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on where the checkpoint was made, and listen to signals."""
        self.directory = run_folder(trainer) / CHECKPOINTS  # a broadcast
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.directory.mkdir(parents=True, exist_ok=True)  # this run has begun, says the folder
        self._last_step = trainer.estimated_stepping_batches
        self._seen = self._saved = trainer.global_step
        self._signal = 0
        if self._restored:
            states = self._restored["random"]
            if len(states) != trainer.world_size:
                raise UserError(
                    f"the checkpoint is of {len(states)} processes, but there are {trainer.world_size}: continue with "
                    f"{len(states)}"
                )
            if trainer.is_global_zero:
                continue_events(trainer, self._restored["unwritten"])
            set_random_state(states[trainer.global_rank])
            self._restored = {}
        # In place of Lightning's handlers, which save in the middle of a step, and talk to the other processes while
        # these do something else; it puts back what was there before when training ends.
        if threading.current_thread() is threading.main_thread():  # the only one that may
            for number in STOP_SIGNALS:
                signal.signal(number, self._hear)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time to."""
        # Resumed from the last batch of an epoch, Lightning would pass over what comes at its end: its validation.
        # Where every batch is the last one of its epoch, that is the smaller loss.
        ends_epoch = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch and trainer.num_training_batches > 1
        if trainer.global_step != self._seen and not ends_epoch:
            self._seen = trainer.global_step
            self._save_if_due(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the final weights."""
        self._save(trainer)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        if number == signal.SIGINT:  # whoever asks again does not want to wait
            signal.signal(number, signal.default_int_handler)

    def _save_if_due(self, trainer: L.Trainer) -> None:
        stop = trainer.strategy.reduce_boolean_decision(bool(self._signal), all=False)
        step = trainer.global_step
        if step >= self._last_step:
            return  # it is saved at once, when the last measurement has been made
        if stop or step // self.every_n_train_steps > self._saved // self.every_n_train_steps:
            self._save(trainer)
        if stop:
            rank_zero_info(f"\ntold to stop: saved at step {step}; the same command with --ckpt_path last continues")
            raise SystemExit(self._status(trainer))

    def _save(self, trainer: L.Trainer) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(self.directory / "last.ckpt", weights_only=False)
        self._saved = trainer.global_step

    def _status(self, trainer: L.Trainer) -> int:
        # Where Lightning has started the other processes, it kills the first one if another ends before it in error.
        environment = getattr(trainer.strategy, "cluster_environment", None)
        started_here = environment is not None and not environment.creates_processes_externally
        return 0 if started_here and trainer.global_rank else EX_TEMPFAIL
