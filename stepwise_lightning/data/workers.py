"""Processes that load data: signals, full shared memory, and the wait for a batch."""

from __future__ import annotations

import errno
import os
import signal
from multiprocessing import queues
from types import FrameType
from typing import Any, NoReturn

from torch.utils.data import dataloader

from stepwise_lightning.errors import STOP_SIGNALS


def prepare_worker(worker: int) -> None:
    """Prepare a data worker: ``DataLoader(worker_init_fn=prepare_worker)``.

    It ignores stop signals, because the training process handles them and then ends its workers. It ends if a batch
    cannot be sent, for example because shared memory is full; Python would drop the batch, and training would wait for
    it forever.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]


def _end_worker(error: Exception, batch: Any) -> NoReturn:
    """End this process; torch reports its exit status in the training process."""
    os._exit(errno.ENOSPC if "shared memory" in str(error) or "No space left" in str(error) else 1)


def awaited_batch(frame: FrameType | None) -> FrameType | None:
    """Return the call in which a stack waits for a batch of data workers, None if it does not wait."""
    while frame is not None:
        if frame.f_code is dataloader._MultiProcessingDataLoaderIter._get_data.__code__:
            return frame
        frame = frame.f_back
    return None
