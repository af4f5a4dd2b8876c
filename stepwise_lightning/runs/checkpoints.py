"""When a run is saved, and how: whole, and in time when it is told to stop."""

from __future__ import annotations

import io
import re
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info

from stepwise_lightning.distributed import all_gather_objects
from stepwise_lightning.errors import UserError
from stepwise_lightning.files import atomic_write
from stepwise_lightning.runs.folders import CHECKPOINTS, begin_folder, free_name, is_behind, run_folder
from stepwise_lightning.runs.resume import (
    begin_epoch,
    continue_events,
    random_state,
    reopen_epoch,
    restore_precision,
    restore_randomness,
    unwritten_metrics,
)
from stepwise_lightning.signals import EX_TEMPFAIL, STOP_SIGNALS

_KEY = "stepwise_lightning"
# The file that a Trainer keeps up to date, which its next fit goes on writing.
_files: WeakKeyDictionary[Any, Path] = WeakKeyDictionary()


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
    75. Where that step is the last one of an epoch, validation and one more step come first; where it is the last one
    of training, training ends as it would have.

    Besides what Lightning saves it keeps the state of the random number generators of each process. When training is
    resumed, events that TensorBoard got after the checkpoint are marked as void, and a run that had ended within an
    epoch, because ``max_steps`` was reached, goes on within it.

    Where the folder has a ``last.ckpt`` of another run, the file is ``last-v1.ckpt``, and one line says so. Under
    ``fast_dev_run`` nothing is written.

    Args:
        every_n_train_steps: how often; what is lost by a kill without warning is at most so many steps.

    Raises:
        ValueError: ``every_n_train_steps`` is below 1.
        OSError: the folder cannot be made, or the file not written.

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
        self._restored = {}
        if trainer.state.fn == "fit":
            self._restored = checkpoint.get(_KEY, {})
            reopen_epoch(checkpoint, trainer.accumulate_grad_batches)
            restore_precision(trainer, pl_module, checkpoint)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on where the checkpoint was made, and listen to signals."""
        self.directory = run_folder(trainer) / CHECKPOINTS  # a broadcast
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            begin_folder(self.directory, trainer.loggers)
        self._seen = self._saved = self._resumed = trainer.global_step
        self._stepped_within_epoch = begin_epoch(trainer)
        self._signal = 0
        if self._restored:
            if trainer.is_global_zero:
                continue_events(trainer, self._restored["unwritten"])
            restore_randomness(self._restored["random"], trainer.global_rank, trainer.world_size)
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
        if trainer.global_step == self._seen:
            return
        self._seen = trainer.global_step
        # Resumed from the last batch of an epoch, Lightning would pass over what comes at its end: its validation.
        # Where no other batch of an epoch makes a step, that is the smaller loss.
        ends_epoch = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        passes = ends_epoch and self._stepped_within_epoch
        self._stepped_within_epoch = not ends_epoch
        if not passes:
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
        if _is_last_step(trainer):
            return  # it is saved at once, when the last measurement has been made
        if stop or step // self.every_n_train_steps > self._saved // self.every_n_train_steps:
            self._save(trainer)
        if stop:
            rank_zero_info(f"\ntold to stop: saved at step {step}; the same command with --ckpt_path last continues")
            raise SystemExit(self._status(trainer))

    def _save(self, trainer: L.Trainer) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(self._file(trainer), weights_only=False)
        self._saved = trainer.global_step

    def _file(self, trainer: L.Trainer) -> Path:
        """Return where this run is saved: nothing that another run has written is overwritten."""
        path = _files.get(trainer)
        if path is None or path.parent != self.directory:
            name = trainer.strategy.broadcast(self._free_name(trainer) if trainer.is_global_zero else "")
            path = _files[trainer] = self.directory / f"{name}.ckpt"
            if name != "last" and path.resolve() != _resolved(trainer.ckpt_path):
                rank_zero_info(f"{self.directory} has a last.ckpt of another run: this one is saved as {path.name}")
        return path

    def _free_name(self, trainer: L.Trainer) -> str:
        resumed = _resolved(trainer.ckpt_path)
        continues = resumed is not None and resumed.parent == self.directory.resolve()
        if resumed is not None and continues and re.fullmatch(r"last(-v\d+)?", resumed.stem):
            return resumed.stem

        def is_taken(name: str) -> bool:
            path = self.directory / f"{name}.ckpt"
            # Resumed from another checkpoint beside it, this run is the one that has written it, if it is behind.
            return path.exists() and not (continues and is_behind(path, self._resumed))

        return free_name("last", is_taken)

    def _status(self, trainer: L.Trainer) -> int:
        # Where Lightning has started the other processes, it kills the first one if another ends before it in error.
        environment = getattr(trainer.strategy, "cluster_environment", None)
        started_here = environment is not None and not environment.creates_processes_externally
        return 0 if started_here and trainer.global_rank else EX_TEMPFAIL


def _is_last_step(trainer: L.Trainer) -> bool:
    """Return whether training ends after this step; estimates of how many there will be can be wrong, or missing."""
    loop = trainer.fit_loop
    if 0 <= trainer.max_steps <= trainer.global_step or trainer.should_stop and loop._can_stop_early:
        return True
    progress: Any = loop.epoch_progress.current
    epochs = progress.processed + loop.epoch_loop.batch_progress.is_last_batch
    return loop.max_epochs is not None and 0 <= loop.max_epochs <= epochs


def _resolved(path: Any) -> Path | None:
    return None if path is None else Path(path).resolve()
