"""``LastCheckpoint`` saves and handles signals for runs of any length."""

import os
import signal
import time
from datetime import timedelta

import lightning as L
import pytest
import torch
import torch.distributed as dist
from stream_runs import Model, loader, saved, trainer_for

from stepwise_lightning import SpectrumLogger
from stepwise_lightning.errors import EX_TEMPFAIL

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*ended before the epoch ended and your dataloader is not resumable"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Event(L.Callback):
    """Call a function after a given number of steps."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            self.action(trainer)


def send_signal(_):
    os.kill(os.getpid(), signal.SIGTERM)


def raise_max_steps(trainer):
    trainer.fit_loop.epoch_loop.max_steps = 60


LENGTHS = {
    "a stream, epochs without end": ({"max_epochs": -1}, loader(), 1),
    "a stream, a number of epochs": ({"max_epochs": 3}, loader(100), 1),
    "a stream of one batch an epoch": ({"max_epochs": 50}, loader(2), 1),
    "one step an epoch": ({"max_epochs": 50, "accumulate_grad_batches": 8}, loader(12, sized=True), 1),
    "two optimisers": ({"max_epochs": 2}, loader(36, sized=True), 2),
    "max_time": ({"max_epochs": 10**6, "max_time": timedelta(minutes=5)}, loader(100, sized=True), 1),
    "max_steps and a stream": ({"max_steps": 60}, loader(), 1),
}


@pytest.mark.parametrize(("length", "data", "optimizers"), LENGTHS.values(), ids=LENGTHS)
def test_saves_and_handles_signals_for_any_length(length, data, optimizers, tmp_path):
    steps = []
    look = Event(44, lambda _: steps.append(saved(tmp_path)))
    with pytest.raises(SystemExit) as stop:
        trainer_for(tmp_path, look, Event(46, send_signal), **length).fit(Model(optimizers), data)
    assert stop.value.code == EX_TEMPFAIL
    assert steps[0] == {"last": 40} and saved(tmp_path) == {"last": 46}


def test_max_steps_raised_during_training(tmp_path):
    with pytest.raises(SystemExit):
        trainer = trainer_for(tmp_path, Event(20, raise_max_steps), Event(46, send_signal), max_steps=30)
        trainer.fit(Model(), loader())
    assert saved(tmp_path) == {"last": 46}


def stop_early(trainer):
    trainer.should_stop = True


ENDS = {
    "max_steps": ({"max_steps": 20}, lambda _: None, 20),
    "max_epochs": ({"max_epochs": 2}, lambda _: None, 100),
    "two optimisers": ({"max_steps": 40}, lambda _: None, 40),
    "early stopping": ({"max_steps": 1000}, stop_early, 20),
}


@pytest.mark.parametrize(("length", "event", "last"), ENDS.values(), ids=ENDS)
def test_last_checkpoint_has_the_last_measurement(length, event, last, tmp_path):
    """A signal at the last step does not save before the last measurement."""
    spectra, seen = SpectrumLogger(num_points=5), []
    look = Event(last, lambda _: seen.append(saved(tmp_path).get("last", 0)))
    trainer = trainer_for(tmp_path, spectra, Event(20, event), Event(last, send_signal), look, **length)
    trainer.fit(Model(2 if last == 40 else 1), loader(100, sized=True))
    checkpoint = torch.load(next(tmp_path.rglob("last.ckpt")), weights_only=True)
    steps = checkpoint["stepwise_lightning_spectra"]["spectrum"]["record"]["step"]
    assert checkpoint["global_step"] == last == steps[-1] and seen[0] < last


@pytest.mark.parametrize("enough", [False, True])
def test_should_stop_before_min_steps_is_not_the_last_step(enough, tmp_path):
    trainer = trainer_for(
        tmp_path,
        Event(15, stop_early),
        Event(25, send_signal),
        max_epochs=-1,
        min_epochs=0,
        min_steps=20 if enough else 50,
    )
    if enough:
        trainer.fit(Model(), loader())
        assert saved(tmp_path) == {"last": 20}
    else:
        with pytest.raises(SystemExit):
            trainer.fit(Model(), loader())
        assert saved(tmp_path) == {"last": 25}


def test_max_time_ends_with_a_checkpoint(tmp_path):
    slow = L.pytorch.callbacks.LambdaCallback(on_train_batch_end=lambda *_: time.sleep(0.01))
    trainer = trainer_for(tmp_path, slow, max_epochs=-1, max_time=timedelta(seconds=1))
    trainer.fit(Model(), loader())
    assert saved(tmp_path) == {"last": trainer.global_step}


class Calls(L.Callback):
    """Count collective calls from Python in steps 2 to 4."""

    def __init__(self):
        self.names = []

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step in (2, 5):
            self.names.append([])

    def count(self, patch, name):
        call = getattr(dist, name)

        def counted(*arguments, **options):
            if len(self.names) == 1:
                self.names[0].append((name, options.get("async_op", False)))
            return call(*arguments, **options)

        patch.setattr(dist, name, counted)


def collective_calls(folder):
    calls = Calls()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "broadcast", "barrier", "all_gather_into_tensor", "all_gather_object"):
            calls.count(patch, name)
        options = {"max_steps": 6, "strategy": "ddp", "devices": 2}
        trainer_for(folder, calls, every=100, **options).fit(Model(), loader(100, sized=True))
    return calls.names[0]


def test_two_ranks_do_not_wait_for_signals(tmp_path, processes):
    for calls in processes.run_ranks(2, collective_calls, tmp_path):
        assert calls == [("all_reduce", True)] * 3
