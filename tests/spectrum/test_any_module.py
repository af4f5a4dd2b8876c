"""SpectrumLogger on modules of users: losses, optimisers, run lengths, state of the module."""

import math
import random

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from short_runs import BATCHES, Classifier, X, Y, fit
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from stepwise_lightning import LastCheckpoint, SpectrumLogger
from stepwise_lightning.callbacks.run_files import rows
from stepwise_lightning.features import capture
from stepwise_lightning.spectrum import embedding_eigenvalues


class Adversaries(L.LightningModule):
    """Generator and discriminator in manual optimisation; training_step returns None."""

    def __init__(self, lightning_optimizers=True):
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = nn.Linear(8, 4), nn.Linear(4, 1)
        self.lightning_optimizers = lightning_optimizers

    def forward(self, x):
        return self.generator(x)

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers(use_pl_optimizer=self.lightning_optimizers):
            optimizer.zero_grad()
            self.manual_backward(self.discriminator(self(batch[0])).square().mean())
            optimizer.step()

    def configure_optimizers(self):
        one, other = torch.optim.SGD(self.generator.parameters(), 0.1), torch.optim.SGD(self.parameters(), 0.3)
        return [one, other], []


class HiddenOptimizer(Adversaries):
    """Module whose optimiser is unknown to Lightning."""

    def __init__(self):
        super().__init__()
        self.hidden = torch.optim.SGD(self.generator.parameters(), 0.1)

    def training_step(self, batch, batch_idx):
        self.hidden.zero_grad()
        self.generator(batch[0]).square().mean().backward()
        self.hidden.step()
        return {"some": "thing"}

    def configure_optimizers(self):
        return None


class Losses(L.Callback):
    """Collects the return values of training_step."""

    def on_train_start(self, trainer, module):
        self.returned, step = [], module.training_step

        def collecting(*arguments):
            loss = step(*arguments)
            self.returned.append((trainer.global_step, float(loss.detach())))
            return loss

        module.training_step = collecting


def test_loss_is_the_mean_over_accumulated_batches(tmp_path):
    spectra, losses = SpectrumLogger(num_points=30), Losses()
    fit(Classifier(), tmp_path, spectra, losses, accumulate_grad_batches=3)  # 4 batches per epoch: 3 and 1
    by_step = {}
    for step, loss in losses.returned:
        by_step.setdefault(step, []).append(loss)
    assert {len(each) for each in by_step.values()} == {1, 3}
    steps, measured = spectra.record.steps.tolist(), spectra.record.losses.tolist()
    assert steps == list(range(11)) and math.isnan(measured[-1])
    for step, loss in zip(steps[:-1], measured[:-1], strict=True):
        assert loss == pytest.approx(np.mean(by_step[step]), rel=1e-6)


@pytest.mark.parametrize("returned", [None, {"other": 1.0}], ids=str)
def test_loss_is_nan_if_training_step_returns_none(returned, tmp_path):
    module = Adversaries()
    step = module.training_step
    module.training_step = lambda batch, batch_idx: step(batch, batch_idx) or returned
    spectra = SpectrumLogger()
    fit(module, tmp_path, spectra, max_epochs=2)
    assert spectra.record.losses.isnan().all() and spectra.record.steps[-1] == 16
    assert "covariance" in spectra.record.matrices


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
@pytest.mark.parametrize(
    ("module", "last_step", "last_time"),
    [
        (Adversaries, 40, 2.0),  # steps of both optimisers; rate × 20 steps of the first
        (lambda: Adversaries(lightning_optimizers=False), 20, 2.0),  # Lightning's step count stays 0
        (HiddenOptimizer, 20, 20.0),  # batches, at a rate of 1
    ],
    ids=["two optimisers", "manual steps", "none"],
)
def test_time_counts_the_first_optimiser(module, last_step, last_time, tmp_path):
    spectra = SpectrumLogger(num_points=12)
    fit(module(), tmp_path, spectra)
    assert spectra.record.steps[-1] == last_step
    assert float(spectra.record.times[-1]) == pytest.approx(last_time, rel=1e-12)
    assert (spectra.record.times.diff() > 0).all() and len(spectra.record) > 6


def test_time_uses_the_largest_rate_of_parameter_groups(tmp_path):
    class Groups(Classifier):
        def configure_optimizers(self):
            groups = [{"params": self.features.parameters(), "lr": 0.0}, {"params": self.head.parameters()}]
            return torch.optim.Adam(groups, lr=torch.tensor(0.1), capturable=False, foreach=False)

        def on_train_batch_end(self, *_):
            for group in self.optimizers().param_groups:
                group["lr"] = group["lr"] if isinstance(group["lr"], float) else group["lr"].mul_(0.5)

    spectra = SpectrumLogger(num_points=50)
    fit(Groups(), tmp_path, spectra, max_epochs=2)
    expected = [sum(0.1 * 0.5**k for k in range(step)) for step in spectra.record.steps.tolist()]
    torch.testing.assert_close(spectra.record.times, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)


def test_reused_callback_starts_a_new_record(tmp_path):
    spectra = SpectrumLogger()
    fit(Classifier(), tmp_path, spectra, max_epochs=2)
    first = spectra.record
    fit(Classifier(), tmp_path, spectra, max_epochs=2)
    assert spectra.record is not first and spectra.record.times.tolist() == first.times.tolist()
    assert rows(spectra.record, 3) == rows(first, 3)


def test_second_fit_of_a_trainer_extends_the_record(tmp_path):
    spectra = SpectrumLogger()
    module = Classifier()
    trainer = fit(module, tmp_path, spectra, logger=TensorBoardLogger(tmp_path), max_epochs=2)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, BATCHES)
    assert spectra.record.steps.tolist() == list(range(17))
    torch.testing.assert_close(spectra.record.times, 0.1 * spectra.record.steps.double())
    assert [path.name for path in spectra.directory.glob("*.csv")] == ["spectrum.csv"]


def test_stream_of_unknown_length_is_measured_to_its_end(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([(X[:16], Y[:16])] * 37)

    spectra = SpectrumLogger(num_points=20)
    fit(Classifier(), tmp_path, spectra, data=DataLoader(Stream(), batch_size=None), max_epochs=1)
    assert spectra.record.steps[-1] == 37 and spectra.record.steps[:4].tolist() == [0, 1, 2, 3]


class Masked(Classifier):
    """Draws random numbers and changes buffers in each forward pass."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("latest", torch.zeros(8))

    def forward(self, x):
        self.calls += 1
        self.latest = x.mean(0)
        keep = (torch.rand_like(x) > 0.3) * random.random() * np.random.rand()
        return super().forward(nn.functional.dropout(x * keep, 0.2))


def test_training_is_bit_identical_if_forward_draws_and_counts(tmp_path):
    weights = []
    for callbacks in ([], [SpectrumLogger()]):
        L.seed_everything(1, verbose=False)
        module = Masked()
        L.seed_everything(2, verbose=False)
        fit(module, tmp_path, *callbacks, max_epochs=2)
        weights.append(module.state_dict())
    for name, values in weights[0].items():
        assert torch.equal(values, weights[1][name]), name


def test_frozen_batch_normalisation_uses_running_statistics(tmp_path):
    class Frozen(Classifier):
        def on_train_start(self):
            self.features[1].eval()

    module, spectra = Frozen(), SpectrumLogger(probe=X)
    module.features[1].running_mean.fill_(0.3)
    copy = Classifier()
    copy.load_state_dict(module.state_dict())
    expected = embedding_eigenvalues(copy.eval()(X))
    fit(module, tmp_path, spectra, max_epochs=1)
    torch.testing.assert_close(spectra.record.eigenvalues("covariance")[0], expected)


def test_final_weights_of_other_callbacks_are_measured_and_saved(tmp_path):
    module = Classifier()
    spectra, averaging = SpectrumLogger(probe=X, num_points=50), WeightAveraging()
    fit(module, tmp_path, spectra, averaging, LastCheckpoint(), max_epochs=3)
    module.train()
    expected = embedding_eigenvalues(capture(module, [X], [""])[""][0])
    torch.testing.assert_close(spectra.record.eigenvalues("covariance")[-1], expected)
    assert not torch.allclose(spectra.record.eigenvalues("covariance")[-2], expected, rtol=1e-3)
    checkpoint = torch.load(spectra.directory / "checkpoints/last.ckpt", weights_only=True)
    saved = checkpoint["stepwise_lightning_spectra"]["spectrum"]["record"]["covariance"]
    torch.testing.assert_close(saved[-1], expected)
