"""``LastCheckpoint`` does not overwrite the files of other runs, and runs resume exactly."""

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from stream_runs import Model, loader, saved, trainer_for
from torch.utils.data import DataLoader, IterableDataset

from stepwise_lightning import LastCheckpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*ended before the epoch ended and your dataloader is not resumable"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


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
