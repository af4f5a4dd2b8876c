"""Checkpoints: written atomically, at intervals and before a run stops because of a signal."""

from __future__ import annotations

import io
import re
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from stepwise_lightning.data.workers import awaited_batch
from stepwise_lightning.distributed import DelayedAny, all_gather_objects
from stepwise_lightning.errors import (
    EX_TEMPFAIL,
    SHARED_MEMORY,
    STOP_SIGNALS,
    DivergedError,
    UserError,
    cannot_write,
    reason,
)
from stepwise_lightning.files import atomic_write, reserve
from stepwise_lightning.runs.folders import CHECKPOINTS, check_local, free_name, is_behind, run_folder
from stepwise_lightning.runs.last import search_for_last
from stepwise_lightning.runs.resume import (
    begin_epoch,
    continue_events,
    random_state,
    reopen_epoch,
    restore_precision,
    restore_randomness,
    unwritten_metrics,
    warn_of_skipped_hooks,
)
from stepwise_lightning.runs.strategies import check_strategy

_KEY = "stepwise_lightning"
# Weights, without the rest of a checkpoint, that Lightning's ddp_spawn and ddp_fork pass to the calling process.
_WEIGHTS_OF_SPAWNED = ".temp.ckpt"
# Seconds; a scheduler may send one signal twice, to all processes and through a launcher.
_MIN_WAIT = 1.0
# The checkpoint that each Trainer updates, also in a second fit.
_files: WeakKeyDictionary[Any, Path] = WeakKeyDictionary()


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint plugin that replaces files atomically: ``Trainer(plugins=[AtomicCheckpointIO()])``.

    Lightning writes to the temporary folder first; where that is on another file system, it copies the file, and a kill
    leaves a part of a checkpoint in place of the old one. If a file cannot be written, the old one is unchanged.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path``; to other places than the file system, as Lightning does."""
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()  # the writer of torch does not report why it failed
        torch.save(checkpoint, buffer)
        atomic_write(Path(path), lambda partial: partial.write_bytes(buffer.getbuffer()))

    def load_checkpoint(self, path: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Load a checkpoint, and check that it has the entries that Lightning needs."""
        try:
            checkpoint = super().load_checkpoint(path, *arguments, **options)
            if Path(path).name == _WEIGHTS_OF_SPAWNED:
                return checkpoint
            missing = {"state_dict", "pytorch-lightning_version"} - checkpoint.keys()
            if missing or not isinstance(checkpoint["state_dict"], dict):
                raise ValueError(f"it has no {' and no '.join(sorted(missing)) or 'state_dict of weights'}")
        except FileNotFoundError:
            raise
        except Exception as error:  # torch and pickle raise many types for damaged files
            raise UserError(
                f"the checkpoint cannot be restored ({reason(error)}): is {path} a complete checkpoint of Lightning?"
            ) from error
        return checkpoint


class LastCheckpoint(Checkpoint):
    """Update ``checkpoints/last.ckpt`` of a run, from which the run resumes exactly.

    It is saved every few optimiser steps, when training ends, also if another callback fails then, and when a signal
    stops the run: SIGTERM, SIGUSR1 or SIGINT (Ctrl-C; a second one stops at once). All processes then finish a step,
    save and exit with status 75. Guarantees for signals, resuming and runs in one folder: ``docs/failures.md``. Under
    ``fast_dev_run`` nothing is written.

    ``ckpt_path="last"`` of the Trainer's methods loads this checkpoint; ``"best"`` loads the best one of a
    ``ModelCheckpoint``, or this one if the Trainer has no ``ModelCheckpoint``.

    Args:
        every_n_train_steps: interval between checkpoints; a kill without warning loses at most this many steps.

    Raises:
        ValueError: ``every_n_train_steps`` is below 1.
        OSError: the folder cannot be created, or the file cannot be written.
        UserError: the folder of the run is not local, or the strategy writes checkpoints of several files.

    """

    def __init__(self, every_n_train_steps: int = 100) -> None:
        if every_n_train_steps < 1:
            raise UserError(f"every_n_train_steps must be at least 1, got {every_n_train_steps}")
        self.every_n_train_steps = every_n_train_steps
        self.best_model_path = ""  # as the attribute of Lightning's ModelCheckpoint
        self._signal, self._interrupted = 0, False
        self._awaited: FrameType | None = None
        self._waits_since = 0.0
        self._restored: dict[str, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check folder and strategy, and move behind a ModelCheckpoint, whose checkpoint is the best one."""
        if stage == "fit":
            check_local(trainer)
            check_strategy(trainer, saves=True)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        place = callbacks.index(self)
        end = max((index for index, each in enumerate(callbacks) if isinstance(each, ModelCheckpoint)), default=place)
        if end > place:  # a new list, because Lightning iterates over the old one
            trainer.callbacks = [  # type: ignore[attr-defined]
                *callbacks[:place], *callbacks[place + 1 : end + 1], self, *callbacks[end + 1 :]
            ]  # fmt: skip

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the state that Lightning omits; loggers write their buffers first."""
        for logger in trainer.loggers:
            logger.save()
        checkpoint[_KEY] = {"random": all_gather_objects(random_state()), "unwritten": unwritten_metrics(trainer)}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the restored state until training starts."""
        self._restored = {}
        if trainer.state.fn == "fit":
            self._restored = checkpoint.get(_KEY, {})
            reopen_epoch(checkpoint, trainer.accumulate_grad_batches)
            restore_precision(trainer, pl_module, checkpoint)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Create the folder, restore the state of the checkpoint, and install signal handlers."""
        self.directory = run_folder(trainer) / CHECKPOINTS  # a broadcast
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise cannot_write(self.directory, error) from error
        self._seen = self._saved = self._resumed = trainer.global_step
        self._any_signal = DelayedAny(trainer.strategy.root_device)
        self._stepped_within_epoch = begin_epoch(trainer)
        if self._stepped_within_epoch:
            warn_of_skipped_hooks(trainer, pl_module)
        self._signal, self._interrupted, self._awaited = 0, False, None
        if self._restored:
            if trainer.is_global_zero:
                continue_events(trainer, self._restored["unwritten"])
            restore_randomness(self._restored["random"], trainer.global_rank, trainer.world_size)
            self._restored = {}
        # They replace Lightning's handlers, which save in the middle of a step and send messages to processes that do
        # something else. Lightning restores the previous handlers when training ends.
        if threading.current_thread() is threading.main_thread():  # the only thread that may set handlers
            for number in STOP_SIGNALS:
                signal.signal(number, self._on_signal)
            # Lightning asks before each batch whether its own handler got SIGTERM, which stops the queue of a GPU.
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save after every ``every_n_train_steps`` steps, or after a signal."""
        if trainer.global_step == self._seen:
            return
        self._seen = trainer.global_step
        # Resumed from the last batch of an epoch, Lightning would skip the validation at its end. If every step ends an
        # epoch, skipping validation is the smaller loss.
        ends_epoch = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        skip = ends_epoch and self._stepped_within_epoch
        self._stepped_within_epoch = not ends_epoch
        if not skip:
            self._save_at_interval(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the final weights."""
        self._save(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save the final weights if another callback fails after the last step."""
        failed = isinstance(exception, Exception) and not isinstance(exception, (DivergedError, OSError))
        # Several processes do not fail together, and would wait for each other.
        if failed and trainer.world_size == 1 and is_over(trainer) and self._saved < trainer.global_step:
            self._save(trainer)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        batch, now = awaited_batch(frame), time.monotonic()
        if batch is None or batch is not self._awaited:
            self._awaited, self._waits_since = batch, now
        elif now - self._waits_since >= _MIN_WAIT:
            raise UserError(f"data workers have sent no batch since the first signal; probably {SHARED_MEMORY}")
        if number == signal.SIGINT and self._interrupted:  # a second Ctrl-C stops at once
            signal.default_int_handler(number, frame)
        self._signal, self._interrupted = number, self._interrupted or number == signal.SIGINT

    def _save_at_interval(self, trainer: L.Trainer) -> None:
        stop = self._any_signal(bool(self._signal))
        step = trainer.global_step
        if _is_last_step(trainer):
            return  # on_train_end saves, after the last measurement
        if stop or step // self.every_n_train_steps > self._saved // self.every_n_train_steps:
            self._save(trainer)
        if stop:
            rank_zero_info(
                f"\nstopped by a signal: saved at step {step}; the same command with --ckpt_path last resumes"
            )
            raise SystemExit(self._status(trainer))

    def _save(self, trainer: L.Trainer) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.best_model_path = str(self._file(trainer))
            trainer.save_checkpoint(self.best_model_path, weights_only=False)
        self._saved = trainer.global_step

    def _file(self, trainer: L.Trainer) -> Path:
        """Return the path of this run's checkpoint; files of other runs are not overwritten."""
        path = _files.get(trainer)
        if path is None or path.parent != self.directory:
            name = trainer.strategy.broadcast(self._free_name(trainer) if trainer.is_global_zero else "")
            path = _files[trainer] = self.directory / f"{name}.ckpt"
            if name != "last" and path.resolve() != _resolved(trainer.ckpt_path):
                rank_zero_info(f"{self.directory} has a last.ckpt of another run: this run is saved as {path.name}")
        return path

    def _free_name(self, trainer: L.Trainer) -> str:
        resumed = _resolved(trainer.ckpt_path)
        in_place = resumed is not None and resumed.parent == self.directory.resolve()
        if resumed is not None and in_place and re.fullmatch(r"last(-v\d+)?", resumed.stem):
            return resumed.stem

        def is_taken(name: str) -> bool:
            path = self.directory / f"{name}.ckpt"
            # A run resumed from another checkpoint in its folder has written this file itself, if it is behind.
            return not reserve(path) and not (in_place and is_behind(path, self._resumed))

        return free_name("last", is_taken)

    def _status(self, trainer: L.Trainer) -> int:
        # Where Lightning has started the other processes, it kills the first one if another one fails before it.
        environment = getattr(trainer.strategy, "cluster_environment", None)
        started_here = environment is not None and not environment.creates_processes_externally
        return 0 if started_here and trainer.global_rank else EX_TEMPFAIL


search_for_last(LastCheckpoint)


def is_over(trainer: L.Trainer) -> bool:
    """Return True after the last step of training."""
    count = trainer.fit_loop.epoch_loop.batch_progress.current
    return trainer.global_step > 0 and count.ready == count.completed and _is_last_step(trainer)


def _is_last_step(trainer: L.Trainer) -> bool:
    """Return True if training ends after this step; Lightning's estimate of the last step can be wrong or missing."""
    loop = trainer.fit_loop
    if 0 <= trainer.max_steps <= trainer.global_step or trainer.should_stop and loop._can_stop_early:
        return True
    progress: Any = loop.epoch_progress.current
    epochs = progress.processed + loop.epoch_loop.batch_progress.is_last_batch
    return loop.max_epochs is not None and 0 <= loop.max_epochs <= epochs


def _resolved(path: Any) -> Path | None:
    return None if path is None else Path(path).resolve()
