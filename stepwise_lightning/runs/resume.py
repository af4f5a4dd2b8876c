"""State that Lightning's checkpoints lack: random number generators, position in an epoch, pending metrics."""

from __future__ import annotations

import random
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ProgressBar
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from stepwise_lightning.runs.loggers import tensorboard_writers
from stepwise_lightning.seeding import hashed_seed


def random_state() -> dict[str, Any]:
    """Return the state of this process's random number generators, as tensors, numbers and tuples."""
    # Reading the state would initialise CUDA in a process that trains on the CPU.
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    numpy = tuple(part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state())
    state = {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate(), "numpy": numpy}
    return state | ({"mps": torch.mps.get_rng_state()} if torch.backends.mps.is_available() else {})


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the state returned by :func:`random_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])


def restore_randomness(states: list[dict[str, Any]], rank: int, num_ranks: int) -> None:
    """Restore the random number generators of this rank; the saved run may have had another number of ranks.

    Rank r takes the r-th state. A rank without a saved state is seeded by state r mod ``len(states)`` and by r: no two
    ranks draw the same numbers.
    """
    if len(states) != num_ranks:
        rank_zero_info(
            f"the checkpoint is of {len(states)} process(es), this run has {num_ranks}: samples, views and losses stay "
            "the same, but sums are rounded differently from here on, and random numbers may differ"
        )
    if rank < len(states):
        set_random_state(states[rank])
        return
    seed = hashed_seed(states[rank % len(states)]["torch"].numpy().tobytes().hex(), "rank", rank)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def reopen_epoch(checkpoint: dict[str, Any], accumulate_grad_batches: int = 1) -> None:
    """Change the checkpoint of a run that ended within an epoch: training resumes within that epoch.

    Lightning counts the epoch as completed, and would skip its other batches after ``max_steps`` is raised. The counts
    are reset to their values in the last ``on_train_batch_end``, from which Lightning resumes correctly.
    """
    loop = checkpoint.get("loops", {}).get("fit_loop", {})
    epoch, batches = loop.get("epoch_progress"), loop.get("epoch_loop.batch_progress")
    if not epoch or not batches or batches["is_last_batch"] or not batches["current"]["ready"]:
        return
    if epoch["current"]["processed"] != epoch["current"]["started"]:
        return
    for count in (epoch["total"], epoch["current"]):
        count["processed"] -= 1
        count["completed"] = min(count["completed"], count["processed"])
    if batches["current"]["completed"] == batches["current"]["processed"]:
        for count in (batches["total"], batches["current"]):
            count["completed"] -= 1
        if batches["current"]["ready"] % accumulate_grad_batches == 0:
            loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1


def begin_epoch(trainer: L.Trainer) -> bool:
    """Return True if training resumes within an epoch.

    After a checkpoint at the end of an epoch the next epoch begins; with ``max_steps`` set, Lightning would count its
    batches as part of the previous epoch. One line is logged if a second ``fit`` of a Trainer skips the rest of an
    epoch.
    """
    loop = trainer.fit_loop
    within = loop.epoch_loop.batch_progress.current.ready > 0 and not loop.epoch_loop.batch_progress.is_last_batch
    if within and not loop.is_resuming:
        rank_zero_info(
            "this fit begins a new epoch: the remaining batches of the last epoch of the previous fit are skipped"
        )
    batches, epochs = loop.epoch_loop.batch_progress, loop.epoch_progress
    counts: Any = batches.current, epochs.current
    completed = (
        all(count.ready == count.processed for count in counts) and batches.current.completed == counts[0].processed
    )
    if loop.is_resuming and batches.is_last_batch and completed:
        loop._restarting = False  # the property cannot be set to False
        loop.epoch_loop.restarting = False
    return within and loop.is_resuming


def warn_of_skipped_hooks(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """Warn that ``on_train_epoch_start`` is not called for an epoch within which training resumes.

    Lightning calls it at the start of an epoch only; what it sets is missing unless a checkpoint contains it.
    """
    harmless = (ProgressBar, LearningRateMonitor)
    callbacks = [each for each in trainer.callbacks if not isinstance(each, harmless)]  # type: ignore[attr-defined]
    owners = [type(each).__name__ for each in (pl_module, *callbacks) if _has_epoch_hook(each)]
    if owners:
        rank_zero_warn(
            f"training resumes within epoch {trainer.current_epoch}, for which Lightning does not call "
            f"on_train_epoch_start of {', '.join(owners)}: the run is exact only if checkpoints contain what the hook "
            "sets; otherwise set it in on_train_start, too"
        )


def _has_epoch_hook(instance: Any) -> bool:
    parent = L.LightningModule if isinstance(instance, L.LightningModule) else L.Callback
    hook = instance.on_train_epoch_start  # possibly a built-in function, which is_overridden does not accept
    return getattr(hook, "__func__", hook) is not parent.on_train_epoch_start


def restore_precision(trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Load the weights again if their dtype differs from that of the module, as with ``precision="64-true"``.

    Lightning loads a checkpoint before it converts the module to float64, and would round its weights to float32.
    """
    current, saved = pl_module.state_dict(), checkpoint.get("state_dict", {})
    if any(current[name].dtype != saved[name].dtype for name in current.keys() & saved.keys()):
        trainer.precision_plugin.convert_module(pl_module)
        trainer.strategy.load_model_state_dict(checkpoint, strict=pl_module.strict_loading)


def unwritten_metrics(trainer: L.Trainer) -> dict[str, float]:
    """Return the metrics that Lightning will log after the current callback hook.

    Checkpoints are saved in such a hook; a kill just after it would leave a gap in the logs.
    """
    connector = trainer._logger_connector
    in_batch = connector._first_loop_iter is not None
    if in_batch and (not connector.should_update_logs or trainer.fit_loop._should_accumulate()):
        return {}
    metrics = {name: float(value) for name, value in connector.metrics["log"].items() if isinstance(value, Tensor)}
    return metrics | {"epoch": trainer.current_epoch} if metrics else {}


def continue_events(trainer: L.Trainer, unwritten: dict[str, float]) -> None:
    """Mark TensorBoard's events after the checkpoint as void, and write the metrics that were pending; on rank 0.

    Readers drop earlier events whose step is not below that of the mark.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    step = trainer.global_step
    for writer, start in tensorboard_writers(trainer).items():
        writer.flush()
        if unwritten:
            earlier = EventAccumulator(writer.log_dir, size_guidance={"scalars": 0, "tensors": 1, "images": 1}).Reload()
            logged = {tag for tag in earlier.Tags()["scalars"] if any(s.step == step - 1 for s in earlier.Scalars(tag))}
            for tag, value in unwritten.items():
                if start + tag not in logged:
                    writer.add_scalar(start + tag, value, step - 1)
        writer.file_writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
