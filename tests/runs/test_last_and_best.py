"""``ckpt_path="last"`` and ``"best"`` from Python with ``LastCheckpoint``."""

import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateMonitor,
    ModelCheckpoint,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader

from stepwise_lightning import LastCheckpoint, SpectrumLogger

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multiple `ModelCheckpoint` callbacks"),
    pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty"),
]


class Model(L.LightningModule):
    """Linear model that logs a loss, and records the step at which each fit begins."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)
        self.first_step = -1

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        loss = self(batch).square().mean()
        self.log("loss", loss)
        return loss

    def test_step(self, batch, batch_idx):
        pass

    def on_train_start(self):
        self.first_step = self.global_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Tempered(Model):
    """Sets its temperature by epoch."""

    def on_train_epoch_start(self):
        self.temperature = 1 / (1 + self.current_epoch)


DATA = DataLoader(torch.ones(8, 4), 4)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def trainer(steps: int, *callbacks: L.Callback, logger: object = False) -> L.Trainer:
    settings = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(max_steps=steps, callbacks=list(callbacks), logger=logger, log_every_n_steps=1, **settings)


def fit(steps: int, *callbacks: L.Callback, ckpt_path: str | None = None, logger: object = False) -> int:
    model = Model()
    trainer(steps, *callbacks, logger=logger).fit(model, DATA, ckpt_path=ckpt_path)
    return model.first_step


LOGGERS = {
    "without a logger": lambda: False,
    "TensorBoard": lambda: TensorBoardLogger("runs", version=0),
    "CSV": lambda: CSVLogger("runs", version="mine"),
}


@pytest.mark.parametrize("logger", LOGGERS.values(), ids=LOGGERS)
def test_last_resumes_the_run(logger):
    assert fit(3, LastCheckpoint(), ckpt_path="last", logger=logger()) == 0
    assert fit(6, LastCheckpoint(), SpectrumLogger(), ckpt_path="last", logger=logger()) == 3
    assert fit(9, ModelCheckpoint("best"), LastCheckpoint(), ckpt_path="last", logger=logger()) == 6
    (saved,) = Path().rglob("last*.ckpt")
    assert torch.load(saved, weights_only=True)["global_step"] == 9


def test_last_is_the_checkpoint_of_an_earlier_fit_of_the_trainer():
    ours, model = trainer(3, LastCheckpoint()), Model()
    ours.fit(model, DATA)
    ours.fit_loop.epoch_loop.max_steps = 5
    ours.fit(model, DATA, ckpt_path="last")
    assert model.first_step == 3 and ours.global_step == 5
    ours.test(model, DATA, ckpt_path="last", verbose=False)
    assert "stepwise_runs/version_0/checkpoints/last.ckpt" in str(ours.ckpt_path)


def test_best_is_the_last_checkpoint_without_another_callback():
    ours, model = trainer(3, LastCheckpoint()), Model()
    ours.fit(model, DATA)
    ours.test(model, DATA, ckpt_path="best", verbose=False)
    assert str(ours.ckpt_path).endswith("stepwise_runs/version_0/checkpoints/last.ckpt")


def test_best_is_the_checkpoint_of_model_checkpoint():
    best = ModelCheckpoint("best", monitor="loss", every_n_train_steps=1)
    ours, model = trainer(3, LastCheckpoint(), SpectrumLogger(), best), Model()
    ours.fit(model, DATA)
    ours.test(model, DATA, ckpt_path="best", verbose=False)
    assert ours.ckpt_path == best.best_model_path and Path(best.best_model_path).parent.name == "best"


@pytest.mark.parametrize("method", ["fit", "test"])
def test_best_without_any_checkpoint_is_an_error(method):
    with pytest.raises(ValueError, match="not configured to save the best model"):
        getattr(trainer(3, LastCheckpoint()), method)(Model(), DATA, ckpt_path="best")


EPOCH_HOOKS = {
    "module": (Tempered, [], "Tempered"),
    "schedule": (Model, [lambda: GradientAccumulationScheduler({0: 1, 2: 2})], "GradientAccumulationScheduler"),
    "function": (Tempered, [lambda: LambdaCallback(on_train_epoch_start=print)], "Tempered, LambdaCallback"),
    "none": (Model, [lambda: LearningRateMonitor("step"), TQDMProgressBar], None),
}


@pytest.mark.parametrize(("kind", "callbacks", "names"), EPOCH_HOOKS.values(), ids=EPOCH_HOOKS)
def test_skipped_epoch_hooks_are_named_when_training_resumes_within_an_epoch(kind, callbacks, names):
    def fit(steps: int, ckpt_path: str | None = None) -> list[str]:
        settings = {"logger": CSVLogger("runs", version=0), "enable_model_summary": False, "accelerator": "cpu"}
        run = L.Trainer(max_steps=steps, callbacks=[LastCheckpoint(), *(each() for each in callbacks)], **settings)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run.fit(kind(), DATA, ckpt_path=ckpt_path)
        return [str(each.message) for each in caught if "on_train_epoch_start" in str(each.message)]

    assert not fit(3) and not fit(3, "last")  # within the second epoch, at the end
    messages = fit(6, "last")
    assert (
        not names
        or f"within epoch 1, for which Lightning does not call on_train_epoch_start of {names}:" in messages[0]
    )
    assert len(messages) == bool(names)
    assert not fit(8, "last")  # at the end of an epoch
