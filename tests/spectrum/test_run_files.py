"""Files of SpectrumLogger: several loggers and runs in one folder, and resuming with other settings."""

import csv
import shutil
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from short_runs import Classifier, X, fit
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stepwise_lightning import LastCheckpoint, SpectrumLogger, SpectrumRecord


def test_two_loggers_in_one_trainer_have_separate_files_and_tags(tmp_path):
    one, other = SpectrumLogger(num_points=5), SpectrumLogger(watch=["features"], num_points=9)
    fit(Classifier(), tmp_path, one, other, LastCheckpoint(), logger=TensorBoardLogger(tmp_path))
    folder = one.directory
    assert {path.name for path in folder.glob("*.[cn][sp][vz]")} == {
        f"spectrum{n}.{e}" for n in ("", "_1") for e in ("csv", "npz")
    }
    assert {path.name for path in folder.glob("*.json")} == {"steps.json", "steps_1.json"}
    assert len(SpectrumRecord.load(folder)) < len(SpectrumRecord.load(folder / "spectrum_1.npz"))
    tags = EventAccumulator(str(folder)).Reload().Tags()["scalars"]
    assert {"covariance/eig_000", "spectrum_1/features/covariance/eig_000"} <= set(tags)
    saved = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert saved["stepwise_lightning_spectra"].keys() == {"spectrum", "spectrum_1"}


def test_name_is_the_stem_of_the_files(tmp_path):
    spectra = SpectrumLogger(name="heads", num_points=3)
    fit(Classifier(), tmp_path, spectra, max_epochs=1)
    files = {path.name for path in spectra.directory.glob("heads*")}
    assert files == {"heads.csv", "heads.npz", "heads_steps.json"}


@pytest.mark.parametrize("logger", ["none", "one version"])
def test_second_run_overwrites_nothing(logger, tmp_path):
    def run(seed):
        module, spectra = Classifier(), SpectrumLogger()
        with torch.no_grad():
            module.head.weight.mul_(1 + seed)
        place = False if logger == "none" else TensorBoardLogger(tmp_path, "name", "mine")
        fit(module, tmp_path, spectra, logger=place, max_epochs=2)
        return spectra

    first = run(1)
    before = {path: path.read_bytes() for path in first.directory.glob("s*")}
    second = run(2)
    assert {path: path.read_bytes() for path in before} == before
    files = sorted(tmp_path.rglob("spectrum*.npz"))
    assert len(files) == 2
    for spectra, file in zip((first, second), files if logger == "none" else files[::-1], strict=True):
        assert torch.equal(
            SpectrumRecord.load(file).eigenvalues("covariance"), spectra.record.eigenvalues("covariance")
        )


def test_fast_dev_run_writes_no_files(tmp_path):
    fit(Classifier(), tmp_path, SpectrumLogger(), LastCheckpoint(), logger=False, fast_dev_run=2)
    assert not [path for path in Path(tmp_path).rglob("*") if path.is_file()]


def start(folder, **settings):
    """Train two epochs; return the folder of the run."""
    spectra = SpectrumLogger(**settings)
    fit(Classifier(), folder, spectra, LastCheckpoint(), logger=TensorBoardLogger(folder, version="v"), max_epochs=2)
    return spectra.directory


def resume(path, folder, **settings):
    """Resume a copy of a run for two more epochs; return its first record and its whole record."""
    logger = TensorBoardLogger(folder, version="v")
    shutil.copytree(path, logger.log_dir, dirs_exist_ok=True)
    before = SpectrumRecord.load(path)
    spectra, checkpoint = SpectrumLogger(**settings), Path(logger.log_dir, "checkpoints/last.ckpt")
    fit(Classifier(), folder, spectra, LastCheckpoint(), logger=logger, max_epochs=4, ckpt_path=checkpoint)
    return before, SpectrumRecord.load(spectra.directory), spectra.directory


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stepwise_lightning.callbacks.tensorboard.Charts.draw", lambda *arguments, **options: None)
        patch.setattr("stepwise_lightning.callbacks.run_files._picture", lambda record, path: None)
        return start(tmp_path_factory.mktemp("default"))


def check_resumed(before, record, folder):
    assert record.steps[-1] == 16 and record.steps[0] == 0
    assert set(record.matrices) >= set(before.matrices)
    for matrix in before.matrices:  # the first part is kept bit for bit
        kept = before.eigenvalues(matrix)[:-1]
        assert torch.equal(record.eigenvalues(matrix)[: len(kept), : kept.shape[1]], kept)
    for matrix in record.matrices:
        assert len(record.eigenvalues(matrix)) == len(record.steps)
        record.detect_steps(matrix)
    with (folder / "spectrum.csv").open(newline="") as file:
        assert {int(row["step"]) for row in csv.DictReader(file)} == set(record.steps.tolist())


CHANGED_SETTINGS = {
    "more matrices": {"watch": ["features"]},
    "other matrices": {"output": False, "watch": ["head"], "probe": X[:, :6]},
    "fewer matrices": {"matrices": ["covariance"]},
    "embeddings": {"keep_embeddings": True},
    "other schedule": {"num_points": 7},
    "fewer scalars": {"num_scalars": 1},
    "other probe": {"probe": X[:30]},
}
DEFAULT = ("other matrices", "embeddings")


@pytest.mark.parametrize(
    "change",
    [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow) for name in CHANGED_SETTINGS],
)
def test_resume_with_changed_settings_keeps_the_record(change, default_run, tmp_path):
    check_resumed(*resume(default_run, tmp_path, **CHANGED_SETTINGS[change]))


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGED_SETTINGS)
def test_resume_with_default_settings_keeps_the_record(change, tmp_path):
    path = start(tmp_path / "changed", **CHANGED_SETTINGS[change])
    check_resumed(*resume(path, tmp_path / "default"))


class Logging(Classifier):
    """Logs its loss."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train/loss", loss)
        return loss


class CopyCheckpoint(L.Callback):
    """Copies the checkpoint of step 6 at the start of step 7, as a kill leaves it."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 6:
            checkpoints = Path(trainer.logger.log_dir, "checkpoints")
            shutil.copy(checkpoints / "last.ckpt", checkpoints / "killed.ckpt")


@pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint that ended before the epoch ended")
def test_resumed_run_keeps_the_prefix_of_the_logger(tmp_path):
    def run(ckpt_path=None):
        logger = TensorBoardLogger(tmp_path, version="v", prefix="a")
        callbacks = [CopyCheckpoint(), SpectrumLogger(), LastCheckpoint(every_n_train_steps=3)]
        fit(Logging(), tmp_path, *callbacks, logger=logger, max_epochs=2, ckpt_path=ckpt_path)
        return Path(logger.log_dir)

    run(run() / "checkpoints/killed.ckpt")
    tags = EventAccumulator(str(tmp_path / "lightning_logs/v")).Reload().Tags()["scalars"]
    assert {"a-train/loss", "a-covariance/eig_000"} <= set(tags) and all(tag.startswith("a-") for tag in tags)
