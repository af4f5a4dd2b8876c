"""The spectrum logger on modules as people have them: batches, outputs, optimisers, lengths, endings."""

import csv
import math
import random
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from stepwise_lightning import LastCheckpoint, SpectrumLogger, SpectrumRecord
from stepwise_lightning.callbacks.run_files import rows
from stepwise_lightning.features import capture, views_in
from stepwise_lightning.spectrum import embedding_eigenvalues

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()
PAIRS = DataLoader(TensorDataset(X, Y), batch_size=16)


class Classifier(L.LightningModule):
    """A supervised model with batch normalisation."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.features = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.features(x))

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Adversaries(L.LightningModule):
    """A generator and a discriminator, optimised by hand; training_step returns nothing."""

    def __init__(self, by_lightning=True):
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = nn.Linear(8, 4), nn.Linear(4, 1)
        self.by_lightning = by_lightning

    def forward(self, x):
        return self.generator(x)

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers(use_pl_optimizer=self.by_lightning):
            optimizer.zero_grad()
            self.manual_backward(self.discriminator(self(batch[0])).square().mean())
            optimizer.step()

    def configure_optimizers(self):
        one, other = torch.optim.SGD(self.generator.parameters(), 0.1), torch.optim.SGD(self.parameters(), 0.3)
        return [one, other], []


class OnItsOwn(Adversaries):
    """Keeps its optimiser from Lightning."""

    def __init__(self):
        super().__init__()
        self.own = torch.optim.SGD(self.generator.parameters(), 0.1)

    def training_step(self, batch, batch_idx):
        self.own.zero_grad()
        self.generator(batch[0]).square().mean().backward()
        self.own.step()
        return {"some": "thing"}

    def configure_optimizers(self):
        return None


def fit(module, folder, *callbacks, data=PAIRS, logger=None, ckpt_path=None, **options):
    options = {"max_epochs": 5} | options
    trainer = L.Trainer(
        accelerator="cpu", logger=CSVLogger(folder) if logger is None else logger, callbacks=list(callbacks),
        log_every_n_steps=1, enable_model_summary=False, enable_progress_bar=False,
        enable_checkpointing=any(isinstance(callback, LastCheckpoint) for callback in callbacks),
        default_root_dir=folder, **options,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


# ---- losses and time ----


class Losses(L.Callback):
    """What training_step returned, batch by batch."""

    def on_train_start(self, trainer, module):
        self.returned, step = [], module.training_step

        def noted(*arguments):
            loss = step(*arguments)
            self.returned.append((trainer.global_step, float(loss.detach())))
            return loss

        module.training_step = noted


def test_the_loss_of_an_accumulated_step_is_the_mean_of_what_was_returned(tmp_path):
    spectra, losses = SpectrumLogger(num_points=30), Losses()
    fit(Classifier(), tmp_path, spectra, losses, accumulate_grad_batches=3)  # 4 batches an epoch: 3 and 1
    of_step = {}
    for step, loss in losses.returned:
        of_step.setdefault(step, []).append(loss)
    assert {len(each) for each in of_step.values()} == {1, 3}
    steps, measured = spectra.record.steps.tolist(), spectra.record.losses.tolist()
    assert steps == list(range(11)) and math.isnan(measured[-1])
    for step, loss in zip(steps[:-1], measured[:-1], strict=True):
        assert loss == pytest.approx(np.mean(of_step[step]), rel=1e-6)


@pytest.mark.parametrize("returned", [None, {}, {"other": 1.0}], ids=str)
def test_a_step_that_returns_no_loss_is_measured_without_one(returned, tmp_path):
    module = Adversaries()
    step = module.training_step
    module.training_step = lambda batch, batch_idx: step(batch, batch_idx) or returned
    spectra = SpectrumLogger()
    fit(module, tmp_path, spectra)
    assert spectra.record.losses.isnan().all() and spectra.record.steps[-1] == 40
    assert "covariance" in spectra.record.matrices


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
@pytest.mark.parametrize(
    ("module", "last_step", "last_time"),
    [
        (Adversaries, 40, 2.0),  # both optimisers' steps; the first one's rate × its 20 steps
        (lambda: Adversaries(by_lightning=False), 20, 2.0),  # Lightning's own count stays at 0
        (OnItsOwn, 20, 20.0),  # batches, at a rate of 1
    ],
    ids=["two optimisers", "stepped by hand", "none"],
)
def test_time_is_that_of_the_first_optimiser_and_measured_to_the_end(module, last_step, last_time, tmp_path):
    spectra = SpectrumLogger(num_points=12)
    fit(module(), tmp_path, spectra)
    assert spectra.record.steps[-1] == last_step
    assert float(spectra.record.times[-1]) == pytest.approx(last_time, rel=1e-12)
    assert (spectra.record.times.diff() > 0).all() and len(spectra.record) > 6


def test_time_goes_by_the_largest_rate_even_where_rates_are_tensors(tmp_path):
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


def test_a_callback_that_is_used_again_begins_anew(tmp_path):
    spectra = SpectrumLogger()
    fit(Classifier(), tmp_path, spectra)
    first = spectra.record
    fit(Classifier(), tmp_path, spectra)
    assert spectra.record is not first and spectra.record.times.tolist() == first.times.tolist()
    assert rows(spectra.record, 3) == rows(first, 3)


def test_a_trainer_that_goes_on_adds_to_the_record(tmp_path):
    spectra = SpectrumLogger()
    module, trainer = Classifier(), None
    trainer = fit(module, tmp_path, spectra, logger=TensorBoardLogger(tmp_path), max_epochs=2)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, PAIRS)
    assert spectra.record.steps.tolist() == list(range(17))
    torch.testing.assert_close(spectra.record.times, 0.1 * spectra.record.steps.double())
    assert [path.name for path in spectra.directory.glob("*.csv")] == ["spectrum.csv"]


def test_a_stream_without_a_length_is_measured_to_its_end(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([(X[:16], Y[:16])] * 37)

    spectra = SpectrumLogger(num_points=20)
    fit(Classifier(), tmp_path, spectra, data=DataLoader(Stream(), batch_size=None), max_epochs=1)
    assert spectra.record.steps[-1] == 37 and spectra.record.steps[:4].tolist() == [0, 1, 2, 3]


# ---- nothing is left behind ----


class Masked(Classifier):
    """Draws random numbers and counts, also in evaluation."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("latest", torch.zeros(8))

    def forward(self, x):
        self.calls += 1
        self.latest = x.mean(0)
        keep = (torch.rand_like(x) > 0.3) * random.random() * np.random.rand()
        return super().forward(nn.functional.dropout(x * keep, 0.2))


def test_training_is_bit_identical_though_a_forward_pass_draws_and_counts(tmp_path):
    weights = []
    for callbacks in ([], [SpectrumLogger()]):
        L.seed_everything(1, verbose=False)
        module = Masked()
        L.seed_everything(2, verbose=False)
        fit(module, tmp_path, *callbacks)
        weights.append(module.state_dict())
    for name, values in weights[0].items():
        assert torch.equal(values, weights[1][name]), name


def test_frozen_batch_normalisation_is_measured_as_it_trains(tmp_path):
    class Frozen(Classifier):
        def on_train_start(self):
            self.features[1].eval()

    module, spectra = Frozen(), SpectrumLogger(probe=X)
    module.features[1].running_mean.fill_(0.3)
    expected = embedding_eigenvalues(Frozen.forward(_frozen_copy(module), X))
    fit(module, tmp_path, spectra)
    torch.testing.assert_close(spectra.record.eigenvalues("covariance")[0], expected)


def _frozen_copy(module):
    copy = Classifier()
    copy.load_state_dict(module.state_dict())
    return copy.eval()


def test_weights_that_other_callbacks_put_in_at_the_end_are_measured(tmp_path):
    module = Classifier()
    spectra, averaging = SpectrumLogger(probe=X, num_points=50), WeightAveraging()
    fit(module, tmp_path, spectra, averaging, LastCheckpoint(), max_epochs=3)
    module.train()
    expected = embedding_eigenvalues(capture(module, [X], [""])[""][0])
    torch.testing.assert_close(spectra.record.eigenvalues("covariance")[-1], expected)
    assert not torch.allclose(spectra.record.eigenvalues("covariance")[-2], expected, rtol=1e-3)
    saved = torch.load(spectra.directory / "checkpoints/last.ckpt", weights_only=True)
    kept = saved["stepwise_lightning_spectra"]["spectrum"]["record"]["covariance"]
    torch.testing.assert_close(kept[-1], expected)


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
    taken = views_in(batch)
    assert len(taken) == len(views) and all(one is other for one, other in zip(taken, views, strict=True))


def test_a_function_of_the_batch_settles_the_rest(tmp_path):
    hidden = {"deep": {"names": NAMES}, "flat": LABEL}
    with pytest.raises(ValueError, match=r"no views in a batch of the form \{'deep': .*SpectrumLogger\(views="):
        views_in(hidden)
    assert views_in(hidden, lambda batch: A)[0] is A
    with pytest.raises(ValueError, match=r"views\(batch\) must return one or two tensors"):
        views_in(hidden, lambda batch: batch["deep"])
    spectra = SpectrumLogger(views=lambda batch: (batch[0], 2 * batch[0]))
    fit(Classifier(), tmp_path, spectra)
    assert "cross_correlation" in spectra.record.matrices


# ---- outputs ----


class Tuples(Classifier):
    """Returns what is no tensor."""

    def forward(self, x):
        features = self.features(x)
        return {"z": self.head(features)}, features

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0])[0]["z"], batch[1])


def test_an_output_that_is_no_tensor_is_answered_with_what_to_do(tmp_path):
    with pytest.raises(
        ValueError, match=r"'the module' is not a tensor \(n, …\) but tuple: watch a submodule .*output=False"
    ):
        fit(Tuples(), tmp_path, SpectrumLogger())


def test_submodules_and_functions_are_watched_where_the_output_is_no_tensor(tmp_path):
    def logits(module, view):
        return module(view)[0]["z"]

    spectra = SpectrumLogger(watch=["features", logits], output=False)
    fit(Tuples(), tmp_path, spectra)
    assert set(spectra.record.matrices) == {
        f"{name}.{matrix}" for name in ("features", "logits") for matrix in ("covariance", "normalized_covariance")
    }


def test_a_module_without_forward_or_with_two_views_is_watched_by_its_parts(tmp_path):
    class Two(Classifier):
        def forward(self, one, other):
            return self.features(one), self.features(other)

        def training_step(self, batch, batch_idx):
            return mse_loss(*self(batch[0], batch[0] + 1))

    class Without(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.features = nn.Linear(8, 6)

        def training_step(self, batch, batch_idx):
            return self.features(batch[0]).square().mean()

        configure_optimizers = Classifier.configure_optimizers

    for module in (Two(), Without()):
        spectra = SpectrumLogger(watch=["features"], output=False)
        fit(module, tmp_path, spectra)
        assert spectra.record.eigenvalues("features.covariance").shape[1] == 6


def test_networks_that_are_not_registered_and_numbers_alone(tmp_path):
    class Hidden(Classifier):
        def __init__(self):
            super().__init__()
            self.networks = [nn.Linear(8, 5)]

        def forward(self, x):
            return super().forward(x)[:, 0]  # (n,)

        def training_step(self, batch, batch_idx):
            return self(batch[0]).square().mean()

    spectra = SpectrumLogger(watch=[lambda module, view: module.networks[0](view)])
    fit(Hidden(), tmp_path, spectra)
    assert spectra.record.eigenvalues("covariance").shape[1] == 1
    assert spectra.record.eigenvalues("lambda.covariance").shape[1] == 5
    with pytest.raises(ValueError, match="is not a tensor .* but a scalar"):
        capture(nn.Flatten(), [X], [lambda module, view: view.mean()])
    with pytest.raises(ValueError, match=r"'head' cannot run on a view of shape \(64, 8\) .*watch a function"):
        capture(Classifier(), [X], ["head"], alone=True)


def test_compiled_modules_are_watched_by_the_names_that_they_had(tmp_path):
    module = Classifier()
    module.features = torch.compile(module.features, backend="eager")
    spectra = SpectrumLogger(watch=["features", "features.0"])
    fit(module, tmp_path, spectra)
    assert spectra.record.eigenvalues("features.0.covariance").shape[1] == 6
    whole = torch.compile(Classifier(), backend="eager")
    spectra = SpectrumLogger(watch=["features.0"])
    fit(whole, tmp_path, spectra)
    assert spectra.record.eigenvalues("features.0.covariance").shape[1] == 6


def test_output_lengths_that_vary_are_kept_and_nothing_is_taken_for_a_number(tmp_path):
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


def test_a_short_last_batch_is_kept_and_one_of_a_single_sample_passed_over(tmp_path):
    data = DataLoader(TensorDataset(X[:41], Y[:41]), batch_size=20)  # 20, 20, 1

    class Unnormalised(Classifier):
        def __init__(self):
            super().__init__()
            self.features[1] = nn.Identity()

    spectra = SpectrumLogger(probe="batch", keep_embeddings=True, num_points=50)
    fit(Unnormalised(), tmp_path, spectra, data=data, max_epochs=2)
    assert spectra.record.steps.tolist() == [0, 1, 3, 4, 6]  # of steps 2 and 5 the batch is one sample
    short = DataLoader(TensorDataset(X[:30], Y[:30]), batch_size=20)  # 20, 10
    spectra = SpectrumLogger(probe="batch", keep_embeddings=True)
    fit(Classifier(), tmp_path, spectra, data=short, max_epochs=1)
    assert [int((~spectra.record.embeddings(index).isnan()).all(-1).sum()) for index in range(2)] == [20, 10]
    with np.load(spectra.directory / "spectrum.npz") as saved:
        assert saved["embeddings"].shape == (3, 1, 20, 3)


class Unequal(Classifier):
    """Rank 0 has batches of 4, 4 and 3 samples, rank 1 of 4, 4 and 1."""

    def __init__(self):
        super().__init__()
        self.features[1] = nn.Identity()

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


# ---- files ----


def test_two_loggers_in_one_trainer_have_files_and_tags_of_their_own(tmp_path):
    one, other = SpectrumLogger(num_points=5), SpectrumLogger(watch=["features"], num_points=9)
    named = SpectrumLogger(name="heads", watch=["features"], output=False)
    fit(Classifier(), tmp_path, one, other, LastCheckpoint(), logger=TensorBoardLogger(tmp_path))
    fit(Classifier(), tmp_path, named)
    folder = one.directory
    assert {path.name for path in folder.glob("*.[cn][sp][vz]")} == {
        f"spectrum{n}.{e}" for n in ("", "_1") for e in ("csv", "npz")
    }
    assert {path.name for path in folder.glob("*.json")} == {"steps.json", "steps_1.json"}
    assert len(SpectrumRecord.load(folder)) < len(SpectrumRecord.load(folder / "spectrum_1.npz"))
    tags = EventAccumulator(str(folder)).Reload().Tags()["scalars"]
    assert {"covariance/eig_000", "spectrum_1/features/covariance/eig_000"} <= set(tags)
    assert (named.directory / "heads.csv").exists() and (named.directory / "heads_steps.json").exists()
    saved = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert saved["stepwise_lightning_spectra"].keys() == {"spectrum", "spectrum_1"}


@pytest.mark.parametrize("logger", ["none", "one version"])
def test_a_second_run_overwrites_nothing(logger, tmp_path):
    def run(seed):
        module, spectra = Classifier(), SpectrumLogger()
        with torch.no_grad():
            module.head.weight.mul_(1 + seed)
        place = False if logger == "none" else TensorBoardLogger(tmp_path, "name", "mine")
        fit(module, tmp_path, spectra, logger=place)
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


def test_a_trial_run_writes_no_files(tmp_path):
    fit(Classifier(), tmp_path, SpectrumLogger(), LastCheckpoint(), logger=False, fast_dev_run=2)
    assert not [path for path in Path(tmp_path).rglob("*") if path.is_file()]


OTHER_SETTINGS = [
    {"watch": ["features"]}, {"matrices": ["covariance"]}, {"keep_embeddings": True}, {"num_points": 7},
    {"num_scalars": 1}, {"output": False, "watch": ["head"], "probe": X[:, :6]}, {"probe": X}, {"probe": X[:30]},
]  # fmt: skip


@pytest.mark.parametrize("settings", OTHER_SETTINGS, ids=lambda settings: ", ".join(settings))
@pytest.mark.parametrize("order", [pytest.param(1, id="more"), pytest.param(-1, id="less", marks=pytest.mark.slow)])
def test_a_run_goes_on_with_other_settings_of_the_logger(settings, order, tmp_path):
    first, second = [{}, settings][::order]
    logger = TensorBoardLogger(tmp_path, version="mine")
    spectra = SpectrumLogger(**first)
    fit(Classifier(), tmp_path, spectra, LastCheckpoint(), logger=logger, max_epochs=2)
    before = spectra.record
    again = SpectrumLogger(**second)
    path = spectra.directory / "checkpoints/last.ckpt"
    logger = TensorBoardLogger(tmp_path, version="mine")
    fit(Classifier(), tmp_path, again, LastCheckpoint(), logger=logger, max_epochs=4, ckpt_path=path)
    record = SpectrumRecord.load(again.directory)
    assert record.steps[-1] == 16 and record.steps[0] == 0
    assert set(record.matrices) >= set(before.matrices)
    for matrix in before.matrices:  # all of the first part is there, to the last bit
        kept = before.eigenvalues(matrix)[:-1]
        assert torch.equal(record.eigenvalues(matrix)[: len(kept), : kept.shape[1]], kept)
    for matrix in record.matrices:
        assert len(record.eigenvalues(matrix)) == len(record.steps)
        record.detect_steps(matrix)
    with (again.directory / "spectrum.csv").open(newline="") as file:
        assert {int(row["step"]) for row in csv.DictReader(file)} == set(record.steps.tolist())
