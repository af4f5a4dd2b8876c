"""End of a run: results before figures, the folder in a line, measures for other callbacks, closures and pickling."""

import copy
import json
import logging
import pickle

import lightning as L
import matplotlib
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from short_runs import Classifier, X, Y, fit
from torch.nn.functional import cross_entropy

from stepwise_lightning import LastCheckpoint, SpectrumLogger, SpectrumRecord
from stepwise_lightning.callbacks import run_files
from stepwise_lightning.callbacks.tensorboard import Charts

# Emitted again by pytest.warns, and then not filtered by its module.
pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")
DRAW, PICTURE = Charts.draw, run_files._picture


@pytest.fixture
def figures(monkeypatch, rendered_figures):
    """Draw the figures of runs, which the other tests of this folder skip."""
    monkeypatch.setattr(run_files, "_picture", PICTURE)
    monkeypatch.setattr(Charts, "draw", DRAW)


def assert_complete(spectra, step=20):
    """Check that the results and the last checkpoint of a run belong to its last step."""
    saved = torch.load(spectra.directory / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == step and SpectrumRecord.load(spectra.directory).steps[-1] == step
    assert "covariance" in json.loads((spectra.directory / "steps.json").read_text())


def test_figure_that_fails_is_a_warning_after_results_and_checkpoint(figures, tmp_path):
    spectra = SpectrumLogger(num_points=12)
    with (
        matplotlib.rc_context({"text.usetex": True, "text.latex.preamble": r"\undefined"}),
        pytest.warns(UserWarning, match="trajectories.png is not drawn: "),
        pytest.warns(UserWarning, match="the trajectories are not drawn in TensorBoard: "),
    ):
        fit(Classifier(), tmp_path, spectra, LastCheckpoint(), logger=TensorBoardLogger(tmp_path))
    assert_complete(spectra)
    assert spectra.picture is None


def test_name_of_a_run_with_dollar_signs_is_drawn(figures, tmp_path):
    spectra = SpectrumLogger(num_points=12)
    fit(Classifier(), tmp_path, spectra, LastCheckpoint(), logger=CSVLogger(tmp_path, "lr_$5_$10"))
    assert_complete(spectra)
    assert spectra.picture is not None and spectra.picture.stat().st_size > 1000


class Failing(L.Callback):
    """Fails after the last step."""

    def on_train_end(self, *_):
        raise RuntimeError("a mistake in another callback")


def test_callback_that_fails_at_the_end_costs_no_results(tmp_path):
    spectra = SpectrumLogger(num_points=12, probe=X)
    with pytest.raises(RuntimeError, match="a mistake in another callback"):
        fit(Classifier(), tmp_path, Failing(), spectra, LastCheckpoint(every_n_train_steps=15))
    saved = torch.load(spectra.directory / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 20 and (spectra.directory / "steps.json").is_file()


class FailingEarlier(Classifier):
    """Fails in the last batch."""

    def training_step(self, batch, batch_idx):
        if self.global_step == 19:
            raise RuntimeError("a mistake in the last batch")
        return super().training_step(batch, batch_idx)


def test_run_that_fails_in_its_last_batch_keeps_the_earlier_checkpoint(tmp_path):
    spectra = SpectrumLogger(num_points=12, probe=X)
    with pytest.raises(RuntimeError, match="a mistake in the last batch"):
        fit(FailingEarlier(), tmp_path, spectra, LastCheckpoint(every_n_train_steps=15))
    saved = torch.load(spectra.directory / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 15 and not (spectra.directory / "steps.json").exists()


class WandbLogger(CSVLogger):
    """Logger that refuses pictures."""

    def log_image(self, **_):
        raise RuntimeError("no connection")


def test_logger_that_refuses_the_picture_is_a_warning(monkeypatch, tmp_path):
    monkeypatch.setattr(run_files, "_picture", lambda record, path: b"")
    spectra = SpectrumLogger()
    with pytest.warns(UserWarning, match="WandbLogger does not accept trajectories.png: RuntimeError: no connection"):
        fit(Classifier(), tmp_path, spectra, LastCheckpoint(), logger=WandbLogger(tmp_path))
    assert_complete(spectra)


def test_figure_that_fails_during_training_is_a_warning(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(Charts, "draw", fail)
    monkeypatch.setattr(run_files, "_DRAWING_INTERVAL", 0)
    spectra = SpectrumLogger(num_points=12)
    with pytest.warns(UserWarning, match="the trajectories are not drawn in TensorBoard: MemoryError"):
        fit(Classifier(), tmp_path, spectra, LastCheckpoint())
    assert_complete(spectra)


class SeveralEvaluations(Classifier):
    """Records the loss of each evaluation of the closure."""

    def __init__(self, optimizer):
        super().__init__()
        self.optimizer, self.losses = optimizer, {}

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.setdefault(self.global_step, []).append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        return self.optimizer(self.parameters())

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        if isinstance(optimizer, torch.optim.SGD):  # as sharpness-aware minimisation
            optimizer_closure()
            with torch.no_grad():
                for weight in self.parameters():
                    weight.add_(0.05)
        optimizer.step(optimizer_closure)


OPTIMIZERS = {
    "LBFGS": lambda weights: torch.optim.LBFGS(weights, lr=0.5, max_iter=4),
    "two closures": lambda weights: torch.optim.SGD(weights, lr=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_loss_is_the_first_evaluation_of_a_closure(optimizer, tmp_path):
    module, spectra = SeveralEvaluations(OPTIMIZERS[optimizer]), SpectrumLogger()
    fit(module, tmp_path, spectra, max_epochs=2)
    for step, loss in zip(spectra.record.steps.tolist()[:-1], spectra.record.losses.tolist(), strict=False):
        first, *others = module.losses[step]
        assert loss == pytest.approx(first, abs=1e-7) and abs(others[-1] - first) > 1e-4
    with torch.no_grad():
        expected = float(cross_entropy(Classifier()(X[:16]), Y[:16]))
    assert float(spectra.record.losses[0]) == pytest.approx(expected, abs=1e-6)


def test_rank_measures_are_monitored_by_other_callbacks(tmp_path):
    spectra = SpectrumLogger(watch=["features"], num_points=50)
    best = ModelCheckpoint(monitor="features/covariance/rankme", mode="max", every_n_train_steps=1)
    stop = EarlyStopping("covariance/rankme", mode="max", patience=1, min_delta=100.0, check_on_train_epoch_end=True)
    trainer = fit(Classifier(), tmp_path, spectra, best, stop, LastCheckpoint())
    assert trainer.current_epoch == 2 and stop.stopped_epoch == 1
    ranks = spectra.record.measure("rankme", "features.covariance")
    assert float(best.best_model_score) == pytest.approx(float(ranks[:-1].max()))
    last = spectra.record.measure("effective_rank", "covariance")[-1]
    assert float(trainer.callback_metrics["covariance/effective_rank"]) == pytest.approx(float(last))


def test_rank_measures_are_known_at_once_after_a_resume(tmp_path):
    fit(Classifier(), tmp_path, SpectrumLogger(), LastCheckpoint(), logger=CSVLogger(tmp_path, version=0), max_epochs=2)
    last, stop = tmp_path / "lightning_logs/version_0/checkpoints/last.ckpt", EarlyStopping("heads/covariance/rankme")
    with pytest.raises(RuntimeError, match="heads/covariance/rankme"):
        fit(Classifier(), tmp_path, SpectrumLogger(), stop, LastCheckpoint(), ckpt_path=last, max_epochs=3)
    stop = EarlyStopping("covariance/rankme", check_on_train_epoch_end=True)
    logger = SpectrumLogger(num_points=2)  # no measurement between the resume and the end of the epoch
    fit(Classifier(), tmp_path, logger, stop, LastCheckpoint(), ckpt_path=last, max_epochs=4)
    assert stop.best_score.isfinite()


def test_used_logger_is_pickled_and_copied(tmp_path):
    spectra = SpectrumLogger(watch=["features"], num_points=5)
    trainer = fit(Classifier(), tmp_path, spectra, max_epochs=1)
    for other in (pickle.loads(pickle.dumps(spectra)), copy.deepcopy(spectra)):
        assert torch.equal(other.record.eigenvalues("covariance"), spectra.record.eigenvalues("covariance"))
        assert other.directory == spectra.directory
        fit(Classifier(), tmp_path, other, max_epochs=1)
        assert other.record.steps.tolist() == spectra.record.steps.tolist()
    assert spectra._trainer() is trainer


def test_folder_is_named_at_the_end(tmp_path, caplog):
    spectra = SpectrumLogger(num_points=5)
    with caplog.at_level(logging.INFO):
        fit(Classifier(), tmp_path, spectra, max_epochs=1)
    (line,) = [message for message in caplog.messages if "spectrum.csv" in message]
    assert line == f"{len(spectra.record)} measured spectra are in {spectra.directory}: spectrum.csv, steps.json"
