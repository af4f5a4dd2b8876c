"""Experiments side by side, one process each, behind one progress bar."""

from __future__ import annotations

import logging
import os
import pickle
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import active_children, parent_process
from threading import Thread
from typing import Any

import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from tqdm import tqdm

from reproduce.forkserver import warm_context


def each(function: Callable[..., Any], items: Sequence[tuple[Any, ...]], title: str) -> list[Any]:
    """Call ``function(*item)`` for every item, in as many processes as there are cores, behind one progress bar.

    Function, items and results must be picklable. A single item runs here.
    """
    if len(items) == 1 or os.cpu_count() == 1:
        return [function(*item) for item in tqdm(items, title, unit="run", disable=len(items) == 1 or None)]
    with ProcessPoolExecutor(min(len(items), os.cpu_count() or 1), warm_context(), _begin_beside_others) as pool:
        futures = [pool.submit(_pickled, function, item) for item in items]
        try:
            for future in tqdm(as_completed(futures), title, len(futures), unit="run", disable=None):
                future.result()
        except BaseException:
            for process in active_children():  # or the pool would wait for what they do now
                process.terminate()
            pool.shutdown(cancel_futures=True)
            raise
        return [pickle.loads(future.result()) for future in futures]


def _pickled(function: Callable[..., Any], item: tuple[Any, ...]) -> bytes:
    # As bytes: torch hands tensors to another process as open files, of which a record would need hundreds.
    return pickle.dumps(function(*item))


def _begin_beside_others() -> None:
    prepare_process()
    # Or, were the first process killed, this one would wait for work for ever.
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if (parent := parent_process()) is not None:
        parent.join()
    os._exit(1)


def prepare_process() -> None:
    """Silence start-up messages that are not about the experiment, and compute in one thread.

    These experiments are small: runs side by side use the cores better than threads.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    torch.set_num_threads(1)


def is_alone() -> bool:
    """Return whether this process is the one that was started: others run side by side, behind one bar for all."""
    return parent_process() is None


def progress_bar(steps: int) -> list[TQDMProgressBar]:
    """Return the bar of a single training run, redrawn 50 times; none beside others."""
    return [TQDMProgressBar(refresh_rate=max(1, steps // 50))] if is_alone() else []
