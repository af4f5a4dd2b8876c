"""SpectrumLogger on batches and outputs of any form."""

import lightning as L
import numpy as np
import pytest
import torch
from short_runs import Classifier, X, Y, fit
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from stepwise_lightning import SpectrumLogger, SpectrumRecord
from stepwise_lightning.callbacks.run_files import rows
from stepwise_lightning.features import capture, views_in

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
