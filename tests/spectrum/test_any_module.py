"""SpectrumLogger on modules of users: batches, outputs, losses, optimisers, run lengths."""

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
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from stepwise_lightning import LastCheckpoint, SpectrumLogger, SpectrumRecord
from stepwise_lightning.callbacks.run_files import rows
from stepwise_lightning.features import capture, views_in
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


# ---- losses and time ----


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


# ---- state of the module ----


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


# ---- batches ----

A, B, SMALL = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.randn(4, 3, 4, 4)
LABEL, INDEX, NAMES = torch.arange(4), torch.arange(4), ["a", "b", "c", "d"]
TOKENS = torch.arange(12).view(4, 3)
BYTES = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("batch", "views"),
    [
        (A, [A]),
        ((A, B), [A, B]),
        ((A, B, LABEL), [A, B]),
        ((A, LABEL), [A]),
        (([A, B], LABEL, NAMES), [A, B]),
        ((INDEX, [A, B], LABEL), [A, B]),
        ([[A, B, SMALL, SMALL], LABEL], [A, B]),
        ([SMALL, A, B], [SMALL]),
        ((A, SMALL, B), [A, B]),
        ({"image": A, "label": LABEL}, [A]),
        ({"id": NAMES, "view_1": A, "view_2": B}, [A, B]),
        ({"labelled": (A, LABEL), "unlabelled": (B, LABEL)}, [A]),
        (({"image": A}, LABEL), [A]),
        ([{"image": A, "label": LABEL}, {"image": B, "label": LABEL}], [A]),
        ((TOKENS, LABEL), [TOKENS]),
        ((LABEL, BYTES), [BYTES]),
        ((A, torch.randn(4, 10)), [A]),
    ],
)
def test_views_are_found_in_batches_of_many_forms(batch, views):
    found = views_in(batch)
    assert len(found) == len(views) and all(one is other for one, other in zip(found, views, strict=True))


def test_views_function_replaces_the_search(tmp_path):
    batch = {"deep": {"names": NAMES}, "flat": LABEL}
    with pytest.raises(ValueError, match=r"no views in a batch of the form \{'deep': .*SpectrumLogger\(views="):
        views_in(batch)
    assert views_in(batch, lambda batch: A)[0] is A
    with pytest.raises(ValueError, match=r"views\(batch\) must return one or two tensors"):
        views_in(batch, lambda batch: batch["deep"])
    spectra = SpectrumLogger(views=lambda batch: (batch[0], 2 * batch[0]))
    fit(Classifier(), tmp_path, spectra, max_epochs=1)
    assert "cross_correlation" in spectra.record.matrices


# ---- outputs ----


class Tuples(Classifier):
    """Returns a dictionary and features instead of a tensor."""

    def forward(self, x):
        features = self.features(x)
        return {"z": self.head(features)}, features

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0])[0]["z"], batch[1])


def test_output_that_is_not_a_tensor_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"'the module' is not a tensor \(n, …\) but tuple: watch a submodule .*output=False"
    ):
        fit(Tuples(), tmp_path, SpectrumLogger())


def test_submodules_and_functions_are_watched_without_the_output(tmp_path):
    def logits(module, view):
        return module(view)[0]["z"]

    spectra = SpectrumLogger(watch=["features", logits], output=False)
    fit(Tuples(), tmp_path, spectra, max_epochs=1)
    assert set(spectra.record.matrices) == {
        f"{name}.{matrix}" for name in ("features", "logits") for matrix in ("covariance", "normalized_covariance")
    }


class TwoInputs(Classifier):
    """Takes both views at once."""

    def forward(self, one, other):
        return self.features(one), self.features(other)

    def training_step(self, batch, batch_idx):
        return mse_loss(*self(batch[0], batch[0] + 1))


class WithoutForward(L.LightningModule):
    """Has only submodules."""

    def __init__(self):
        super().__init__()
        self.features = nn.Linear(8, 6)

    def training_step(self, batch, batch_idx):
        return self.features(batch[0]).square().mean()

    configure_optimizers = Classifier.configure_optimizers


@pytest.mark.parametrize("module", [TwoInputs, WithoutForward])
def test_submodules_are_watched_if_forward_takes_no_single_view(module, tmp_path):
    spectra = SpectrumLogger(watch=["features"], output=False)
    fit(module(), tmp_path, spectra, max_epochs=1)
    assert spectra.record.eigenvalues("features.covariance").shape[1] == 6


def test_function_watches_an_unregistered_network(tmp_path):
    class Unregistered(Classifier):
        def __init__(self):
            super().__init__()
            self.networks = [nn.Linear(8, 5)]

        def forward(self, x):
            return super().forward(x)[:, 0]  # (n,)

        def training_step(self, batch, batch_idx):
            return self(batch[0]).square().mean()

    spectra = SpectrumLogger(watch=[lambda module, view: module.networks[0](view)])
    fit(Unregistered(), tmp_path, spectra, max_epochs=1)
    assert spectra.record.eigenvalues("covariance").shape[1] == 1
    assert spectra.record.eigenvalues("lambda.covariance").shape[1] == 5


def test_unusable_watched_outputs_are_refused():
    with pytest.raises(ValueError, match="is not a tensor .* but a scalar"):
        capture(nn.Flatten(), [X], [lambda module, view: view.mean()])
    with pytest.raises(ValueError, match=r"'head' cannot run on a view of shape \(64, 8\) .*watch a function"):
        capture(Classifier(), [X], ["head"], alone=True)


def test_compiled_modules_are_watched_by_their_original_names():
    expected = capture(Classifier(), [X], ["features.0"])["features.0"][0]
    partly = Classifier()
    partly.features = torch.compile(partly.features, backend="eager")
    for module in (partly, torch.compile(Classifier(), backend="eager")):
        captured = capture(module, [X], ["features", "features.0"])
        assert captured["features"][0].shape == (64, 6) and torch.equal(captured["features.0"][0], expected)


def test_shared_submodule_is_watched_under_each_of_its_names():
    module = Classifier()
    module.alias = module.features[0]
    captured = capture(module, [X], ["features.0", "alias"])
    assert torch.equal(captured["features.0"][0], captured["alias"][0])


def test_varying_output_lengths_are_padded_with_nan(tmp_path):
    class Cropped(Classifier):
        def forward(self, x):
            return self.features(x)[:, : 3 + self.global_step % 3]

        def training_step(self, batch, batch_idx):
            return self(batch[0]).square().mean()

    spectra = SpectrumLogger(probe="batch", keep_embeddings=True)
    fit(Cropped(), tmp_path, spectra, max_epochs=1)
    known = (~spectra.record.eigenvalues("covariance").isnan()).sum(1).tolist()
    assert known == [3, 4, 5, 3, 4]
    loaded = SpectrumRecord.load(spectra.directory)
    assert loaded.eigenvalues("covariance").isnan().sum() == spectra.record.eigenvalues("covariance").isnan().sum()
    assert rows(loaded, 0) == rows(spectra.record, 0)


def test_short_last_batch_is_measured_and_a_single_sample_skipped(tmp_path):
    data = DataLoader(TensorDataset(X[:41], Y[:41]), batch_size=20)  # 20, 20, 1
    spectra = SpectrumLogger(probe="batch", keep_embeddings=True, num_points=50)
    fit(Classifier(normalise=False), tmp_path, spectra, data=data, max_epochs=2)
    assert spectra.record.steps.tolist() == [0, 1, 3, 4, 6]  # steps 2 and 5 have one sample
    short = DataLoader(TensorDataset(X[:30], Y[:30]), batch_size=20)  # 20, 10
    spectra = SpectrumLogger(probe="batch", keep_embeddings=True)
    fit(Classifier(), tmp_path, spectra, data=short, max_epochs=1)
    assert [int((~spectra.record.embeddings(index).isnan()).all(-1).sum()) for index in range(2)] == [20, 10]
    with np.load(spectra.directory / "spectrum.npz") as saved:
        assert saved["embeddings"].shape == (3, 1, 20, 3)


class Unequal(Classifier):
    """Rank 0 has batches of 4, 4 and 3 samples, rank 1 of 4, 4 and 1."""

    def __init__(self):
        super().__init__(normalise=False)

    def train_dataloader(self):
        count = 11 - 2 * self.global_rank
        return DataLoader(TensorDataset(X[:count], Y[:count]), batch_size=4)


def record_of_unequal_ranks(tmp_path):
    """Train on two ranks; return the arrays of the record."""
    spectra = SpectrumLogger(probe="batch", keep_embeddings=True)
    ddp = {"strategy": "ddp_find_unused_parameters_true", "devices": 2, "use_distributed_sampler": False}
    fit(Unequal(), tmp_path, spectra, data=None, max_epochs=1, **ddp)
    return spectra.record.arrays()


@pytest.mark.slow
def test_unequal_last_batches_of_ranks_are_measured_without_single_samples(tmp_path, processes):
    arrays, _ = processes.run_ranks(2, record_of_unequal_ranks, tmp_path)
    record = SpectrumRecord.from_arrays(arrays)
    counts = [int((~record.embeddings(index).isnan()).all(-1).sum()) for index in range(len(record))]
    assert record.steps.tolist() == [0, 1, 2, 3] and counts == [8, 8, 3, 3]
