"""Data workers that are killed, cannot send batches, or do not answer."""

import multiprocessing
import os
import signal
import sys
import threading
import time

import lightning as L
import pytest
import torch
from tiny_runs import changed, refusal, write_images
from torch.utils.data import DataLoader

from stepwise_lightning import LastCheckpoint
from stepwise_lightning.data.workers import awaited_batch, prepare_worker
from stepwise_lightning.errors import UserError, one_line
from stepwise_lightning.runs import checkpoints

FULL = "unable to allocate shared memory(shm) for file </torch_30193_0>: No space left on device (28)"
WORKER = "DataLoader worker (pid 3)"
MESSAGES = {
    FULL: "shared memory (/dev/shm) is full",
    f"Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback:\nRuntimeError: {FULL}": "shared memory",
    f"{WORKER} is killed by signal: Bus error. It is possible that dataloader's": "shared memory (/dev/shm) is full",
    f"{WORKER} exited unexpectedly with exit code 28. Details are lost": "shared memory (/dev/shm) is full",
    f"{WORKER} is killed by signal: Killed. ": f"a data worker was killed or does not answer ({WORKER} is killed by si",
    "DataLoader worker (pid(s) 3, 4) exited unexpectedly": "a data worker was killed",
    "DataLoader timed out after 5 seconds": "a data worker was killed or does not answer (DataLoader timed out",
}


@pytest.mark.parametrize("message", MESSAGES)
def test_errors_of_data_workers_are_one_line(message):
    error = RuntimeError("DataLoader worker (pid(s) 3) exited unexpectedly")
    error.__cause__ = RuntimeError(message)
    for line in (one_line(RuntimeError(message)), one_line(error)):
        assert line.startswith(MESSAGES[message]) and "\n" not in line
        assert "(/dev/shm)" in line and "--data.num_workers 0" in line
    assert one_line(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


class Unsendable(torch.utils.data.Dataset):
    """Samples that cannot be pickled, because shared memory is full."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return self

    def __reduce__(self):
        raise RuntimeError(FULL)


class Slow(torch.utils.data.Dataset):
    """Samples that arrive after ``event``."""

    def __init__(self, event):
        self.event = event

    def __len__(self):
        return 8

    def __getitem__(self, index):
        self.event.wait(60)
        return torch.zeros(1)


def test_worker_that_cannot_send_a_batch_ends():
    loader = DataLoader(Unsendable(), num_workers=1, collate_fn=lambda samples: samples, worker_init_fn=prepare_worker,
                        multiprocessing_context="fork")  # fmt: skip
    with pytest.raises(RuntimeError) as stop:
        next(iter(loader))
    assert one_line(stop.value).startswith("shared memory (/dev/shm) is full")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_the_wait_for_a_batch(number, monkeypatch):
    monkeypatch.setattr(checkpoints, "_MIN_WAIT", 0.2)
    previous = signal.signal(number, LastCheckpoint()._on_signal)
    main, event = threading.get_ident(), multiprocessing.get_context("fork").Event()

    def send():
        while awaited_batch(sys._current_frames()[main]) is None:
            time.sleep(0.01)
        for _ in range(2):
            os.kill(os.getpid(), number)
            time.sleep(0.5)

    thread = threading.Thread(target=send)
    try:
        iterator = iter(DataLoader(Slow(event), num_workers=1, multiprocessing_context="fork"))
        thread.start()
        with pytest.raises(UserError, match="no batch since the first signal; probably shared memory .* --shm-size"):
            next(iterator)
    finally:
        event.set()
        thread.join()
        signal.signal(number, previous)


class KillWorker(L.Callback):
    """Kill a data worker between two epochs, as the kernel does when memory runs out."""

    def on_train_epoch_end(self, trainer, pl_module):
        """Kill the first worker."""
        iterator = trainer.fit_loop._combined_loader.flattened[0]._iterator
        os.kill(iterator._workers[0].pid, signal.SIGKILL)


def test_worker_killed_between_epochs_is_one_line(tmp_path, monkeypatch, capsys):
    write_images(tmp_path)
    monkeypatch.chdir(tmp_path)
    changes = {"data.init_args.num_workers": 1, "trainer.max_steps": 20,
               "trainer.callbacks": [{"class_path": f"{__name__}.KillWorker"}]}  # fmt: skip
    line = refusal(capsys, "fit", config=changed(changes))
    assert "a data worker was killed" in line and "signal: Killed" in line
