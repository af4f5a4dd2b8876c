"""``LastCheckpoint`` saves and handles signals for runs of any length, and does not overwrite other runs."""

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader, IterableDataset

from stepwise_lightning import LastCheckpoint, SpectrumLogger
from stepwise_lightning.signals import EX_TEMPFAIL

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*ended before the epoch ended and your dataloader is not resumable"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Stream(IterableDataset):
    """Samples without a length, endless or of a given number."""

    def __init__(self, number: float = float("inf")) -> None:
        self.number = number

    def __iter__(self):
        generator, count = torch.Generator().manual_seed(0), 0
        while count < self.number:
            yield torch.randn(4, generator=generator)
            count += 1


class Model(L.LightningModule):
    """Linear model with one optimiser, or with two and manual optimisation."""

    def __init__(self, optimizers: int = 1) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 3) for _ in range(optimizers))
        self.automatic_optimization = optimizers == 1
        self.batches: list[float] = []

    def forward(self, x):
        return sum(layer(x) for layer in self.layers)

    def training_step(self, batch, batch_idx):
        self.batches.append(float(batch[0, 0]))
        loss = self(batch).square().mean()
        if not self.automatic_optimization:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
        return loss

    def configure_optimizers(self):
        optimizers = [torch.optim.SGD(layer.parameters(), lr=0.01) for layer in self.layers]
        return optimizers[0] if len(optimizers) == 1 else optimizers


class Event(L.Callback):
    """Call a function after a given number of steps."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            self.action(trainer)


def send_signal(_):
    os.kill(os.getpid(), signal.SIGTERM)


def loader(number=float("inf"), sized=False):
    data = torch.randn(int(number), 4, generator=torch.Generator().manual_seed(0)) if sized else Stream(number)
    return DataLoader(data, batch_size=2)


def trainer_for(folder, *callbacks, every=10, **options):
    defaults = {"logger": CSVLogger(folder), "enable_progress_bar": False, "enable_model_summary": False}
    callbacks = [*callbacks, LastCheckpoint(every)]
    return L.Trainer(accelerator="cpu", callbacks=callbacks, **(defaults | options))


def saved(folder):
    """Return the step of each last*.ckpt below a folder."""
    paths = sorted(Path(folder).rglob("last*.ckpt"))
    return {path.stem: torch.load(path, weights_only=True)["global_step"] for path in paths}


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


# Files of different runs.


def fit(folder, steps, logger, ckpt_path=None, model=None, **options):
    trainer = trainer_for(folder, logger=logger, default_root_dir=folder, max_steps=steps, **options)
    trainer.fit(model or Model(), loader(), ckpt_path=ckpt_path)
    return trainer


def test_runs_without_logger_have_separate_folders(tmp_path):
    for steps in (3, 5):
        fit(tmp_path, steps, False)
    files = {path.parts[-3]: path for path in tmp_path.rglob("last.ckpt")}
    assert [torch.load(files[f"version_{n}"], weights_only=True)["global_step"] for n in (0, 1)] == [3, 5]
    fit(tmp_path, 7, False, ckpt_path=files["version_0"])
    assert torch.load(files["version_0"], weights_only=True)["global_step"] == 7 and len(saved(tmp_path)) == 1


def test_second_run_in_a_folder_writes_another_file(tmp_path, capfd):
    def logger():
        return TensorBoardLogger(tmp_path, version="mine")

    fit(tmp_path, 5, logger())
    fit(tmp_path, 3, logger())
    assert saved(tmp_path) == {"last": 5, "last-v1": 3}
    fit(tmp_path, 4, logger())
    assert saved(tmp_path) == {"last": 5, "last-v1": 3, "last-v2": 4}
    checkpoints = next(tmp_path.rglob("last.ckpt")).parent
    fit(tmp_path, 6, logger(), ckpt_path=checkpoints / "last-v1.ckpt")
    assert saved(tmp_path) == {"last": 5, "last-v1": 6, "last-v2": 4}
    fit(tmp_path, 7, logger(), ckpt_path=checkpoints / "last.ckpt")
    assert saved(tmp_path) == {"last": 7, "last-v1": 6, "last-v2": 4}


def test_resume_from_another_checkpoint_in_the_folder(tmp_path):
    """From a checkpoint ahead of last.ckpt the run continues; from one behind, a new run begins."""

    def logger():
        return TensorBoardLogger(tmp_path, version="mine")

    fit(tmp_path, 5, logger())
    checkpoints = next(tmp_path.rglob("last.ckpt")).parent
    for name in ("ahead", "behind"):
        (checkpoints / f"{name}.ckpt").write_bytes((checkpoints / "last.ckpt").read_bytes())
    fit(tmp_path, 7, logger(), ckpt_path=checkpoints / "ahead.ckpt")
    assert saved(tmp_path) == {"last": 7}
    fit(tmp_path, 6, logger(), ckpt_path=checkpoints / "behind.ckpt")
    assert saved(tmp_path) == {"last": 7, "last-v1": 6}


@pytest.mark.parametrize("without_logger", [False, True])
def test_second_fit_of_a_trainer_updates_its_file(without_logger, tmp_path, caplog):
    trainer = fit(tmp_path, 5, False if without_logger else TensorBoardLogger(tmp_path))
    trainer.fit_loop.epoch_loop.max_steps = 8
    trainer.fit(trainer.lightning_module, loader())
    assert saved(tmp_path) == {"last": 8}
    assert sum("begins a new epoch" in record.message for record in caplog.records) == 1


def test_callback_in_another_trainer_is_another_run(tmp_path):
    callback = LastCheckpoint(10)
    for steps in (4, 3):
        options = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        logger = TensorBoardLogger(tmp_path, version="mine")
        L.Trainer(callbacks=[callback], logger=logger, max_steps=steps, **options).fit(Model(), loader())
    assert saved(tmp_path) == {"last": 4, "last-v1": 3}


@pytest.mark.parametrize("without_logger", [False, True])
def test_fast_dev_run_writes_nothing(without_logger, tmp_path, monkeypatch):
    fit(tmp_path / "runs", 5, TensorBoardLogger(tmp_path / "runs"))
    checkpoint = next(tmp_path.rglob("last.ckpt"))
    before = sorted(path for path in tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    logger = False if without_logger else TensorBoardLogger(tmp_path)
    for path in (None, checkpoint):
        fit(tmp_path, 8, logger, ckpt_path=path, fast_dev_run=8)
    assert sorted(path for path in tmp_path.rglob("*")) == before and saved(tmp_path) == {"last": 5}


# Exact resume.


class OneBatch(IterableDataset):
    """Endless repetitions of one sample."""

    def __iter__(self):
        while True:
            yield torch.arange(4.0)


def test_resume_in_float64_is_exact(tmp_path):
    """Lightning loads weights before it converts the module to float64, and would round them."""
    weights = []
    for parts in ((9,), (4, 9)):
        folder, path = tmp_path / str(len(parts)), None
        for steps in parts:
            torch.manual_seed(0)
            options = {"logger": False, "default_root_dir": folder, "precision": "64-true"}
            trainer_for(folder, max_steps=steps, **options).fit(Model(), DataLoader(OneBatch(), 2), ckpt_path=path)
            path = next(folder.rglob("last.ckpt"))
        weights.append(torch.load(path, weights_only=True)["state_dict"]["layers.0.weight"])
    assert weights[0].dtype == torch.float64 and torch.equal(*weights)


@pytest.mark.parametrize(
    "first", [2, 4, pytest.param(5, marks=pytest.mark.slow), pytest.param(9, marks=pytest.mark.slow)]
)
def test_max_steps_raised_after_the_end_resumes_within_the_epoch(first, tmp_path):
    """With four batches per epoch, all samples are the same as in an uninterrupted run."""
    from tiny_runs import write_images

    from stepwise_lightning import LinearEncoder, TwoViewDataModule, VICReg

    write_images(tmp_path, 20)

    class Watched(VICReg):
        def training_step(self, batch, batch_idx):
            seen.append(batch[0].flatten().tolist())
            return super().training_step(batch, batch_idx)

    def train(folder, steps, ckpt_path=None):
        model = Watched(LinearEncoder(48, 3, init_std=0.1), learning_rate=0.001)
        data = TwoViewDataModule(str(tmp_path / "images"), global_batch_size=4, num_probe_pairs=2)
        trainer = trainer_for(folder, logger=False, default_root_dir=folder, max_steps=steps)
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
        return model.encoder.state_dict(), trainer

    seen: list[list[float]] = []
    whole, trainer = train(tmp_path / "whole", 11)
    assert trainer.num_training_batches == 4
    expected, seen = seen, []
    train(tmp_path / "parts", first)
    parts, trainer = train(tmp_path / "parts", 11, next((tmp_path / "parts").rglob("last.ckpt")))
    assert seen == expected and trainer.current_epoch == 3
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


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
