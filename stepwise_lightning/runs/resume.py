"""What a run needs beside Lightning's checkpoint to go on as if it had never stopped."""

from __future__ import annotations

import random
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from stepwise_lightning.runs.loggers import tensorboard_writers
from stepwise_lightning.seeding import hashed_seed


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


def restore_randomness(states: list[dict[str, Any]], rank: int, num_ranks: int) -> None:
    """Let the generators of this rank go on from those of a checkpoint, whose run may have had another number of ranks.

    Rank r takes the r-th state. Where there are more ranks than states, rank r is seeded by state r mod their number
    and by r, so that no two ranks draw the same numbers.
    """
    if len(states) != num_ranks:
        rank_zero_info(
            f"the checkpoint is of {len(states)} process(es), this run has {num_ranks}: samples, views and losses stay "
            "the same, but sums are rounded otherwise from here on, and random numbers may differ"
        )
    if rank < len(states):
        set_random_state(states[rank])
        return
    seed = hashed_seed(states[rank % len(states)]["torch"].numpy().tobytes().hex(), "rank", rank)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def reopen_epoch(checkpoint: dict[str, Any], accumulate_grad_batches: int = 1) -> None:
    """Let a checkpoint of a run that ended within an epoch go on within it.

    Lightning counts that epoch as done, and after ``max_steps`` has been raised it would pass over the rest of it. The
    counts are set to what they were in the last batch's ``on_train_batch_end``, from where Lightning goes on correctly.
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
    """Return whether training starts within an epoch, of which a checkpoint has the beginning.

    Where a checkpoint was made at the end of an epoch, the next one begins: where ``max_steps`` is set, Lightning would
    take its batches for more of the one that is done. One line says what the second ``fit`` of a Trainer leaves out.
    """
    loop = trainer.fit_loop
    within = loop.epoch_loop.batch_progress.current.ready > 0 and not loop.epoch_loop.batch_progress.is_last_batch
    if within and not loop.is_resuming:
        rank_zero_info("this fit begins a new epoch: what the one before had left of its last epoch is not seen")
    batches, epochs = loop.epoch_loop.batch_progress, loop.epoch_progress
    counts: Any = batches.current, epochs.current
    done = all(count.ready == count.processed for count in counts) and batches.current.completed == counts[0].processed
    if loop.is_resuming and batches.is_last_batch and done:
        loop._restarting = False  # the property would not let it be
        loop.epoch_loop.restarting = False
    return within and loop.is_resuming


def restore_precision(trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Load weights again that are more precise than the module is before training: with ``precision="64-true"``.

    Lightning loads a checkpoint before it makes the module float64, and would round its weights to float32.
    """
    ours, saved = pl_module.state_dict(), checkpoint["state_dict"]
    if any(ours[name].dtype != saved[name].dtype for name in ours.keys() & saved.keys()):
        trainer.precision_plugin.convert_module(pl_module)
        trainer.strategy.load_model_state_dict(checkpoint, strict=pl_module.strict_loading)


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
    for board in tensorboard_writers(trainer):
        board.flush()
        if unwritten:
            earlier = EventAccumulator(board.log_dir, size_guidance={"scalars": 0, "tensors": 1, "images": 1}).Reload()
            known = {tag for tag in earlier.Tags()["scalars"] if any(s.step == step - 1 for s in earlier.Scalars(tag))}
            for tag in unwritten.keys() - known:
                board.add_scalar(tag, unwritten[tag], step - 1)
        board.file_writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
