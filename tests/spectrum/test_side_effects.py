"""Measurements change no state of the module or its Trainer, and run in the Trainer's precision."""

import csv
from collections import deque

import numpy as np
import pytest
import torch
from short_runs import Classifier, X, fit
from torch import nn
from torchmetrics import CatMetric, MeanMetric, MetricCollection, SumMetric

from stepwise_lightning import OnlineLinearProbe, SpectrumLogger
from stepwise_lightning.features import capture, on_device
from stepwise_lightning.spectrum import embedding_eigenvalues


class Logging(Classifier):
    """Logs in each forward pass, in several ways."""

    def forward(self, x):
        z = super().forward(x)
        self.log("forward_mean", z.mean(), on_epoch=True)
        self.log_dict({"forward_std": z.std()})
        self.logger.log_metrics({"direct": float(z.detach().max())}, step=self.global_step)
        self.logger.experiment.log_metrics({"experiment": 1.0}, self.global_step)
        return z


def logged_values(spectra):
    module = Logging()
    trainer = fit(module, *spectra, max_epochs=2)
    trainer.logger.save()
    with open(f"{trainer.logger.log_dir}/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = ("forward_mean_step", "forward_mean_epoch", "forward_std", "direct", "experiment")
    return {name: [row[name] for row in rows if row[name]] for name in names}, trainer


def test_log_in_forward_and_in_watched_functions_records_training_only(tmp_path):
    def watched(module, view):
        module.log("watched", view.mean())
        return module(view)

    plain, _ = logged_values([tmp_path / "plain"])
    measured, trainer = logged_values([tmp_path / "measured", SpectrumLogger(watch=["features", watched])])
    assert measured == plain and len(plain["direct"]) == 8
    assert "watched" not in trainer.logged_metrics | trainer.callback_metrics
    assert "log" not in vars(trainer.lightning_module) and trainer.logger.name == "lightning_logs"


class Counting(Classifier):
    """Updates metrics and attributes in each forward pass."""

    def __init__(self):
        super().__init__()
        self.mean, self.all = MeanMetric(), CatMetric()
        self.several = MetricCollection({"sum": SumMetric(), "mean": MeanMetric()})
        self.calls, self.queue, self.counts = 0, torch.zeros(8), np.zeros(1)
        self.recent, self.by_size = deque(maxlen=3), {}
        self.unregistered = [{"mean": MeanMetric()}, nn.BatchNorm1d(8)]

    def forward(self, x):
        z = super().forward(x)
        self.mean.update(z.detach())
        self.all(z.detach()[:, 0])
        self.several(z.detach())
        self.unregistered[0]["mean"].update(z.detach())
        self.unregistered[1](x)
        self.calls += 1
        self.counts += 1
        self.queue.mul_(0.9).add_(x.mean(0))
        self.recent.append(self.calls)
        self.by_size[len(x)] = self.by_size.get(len(x), 0) + 1
        self.latest = x
        return z

    def state(self):
        metrics = [self.mean, self.all, *self.several.values(), self.unregistered[0]["mean"]]
        values = {str(index): metric.compute() for index, metric in enumerate(metrics)}
        counts = [metric.update_count for metric in metrics]
        attributes = self.calls, float(self.counts[0]), list(self.recent), dict(self.by_size), counts
        buffers = {"queue": self.queue, "latest": self.latest, "batch_mean": self.unregistered[1].running_mean}
        return values | buffers, attributes


def test_metrics_and_attributes_that_forward_updates_count_training_only(tmp_path):
    plain, measured = Counting(), Counting()
    fit(plain, tmp_path, max_epochs=2)
    fit(measured, tmp_path, SpectrumLogger(), max_epochs=2)
    (expected, counts), (values, other) = plain.state(), measured.state()
    assert counts == other and counts[0] == 8 and values.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(value, values[name]), name


def test_capture_removes_attributes_that_forward_creates():
    module = Counting()
    capture(module, [X], [""])
    assert not hasattr(module, "latest") and module.calls == 0 and not module.mean.update_called


class NeedsContext(Classifier):
    """Creates a matrix of the default dtype in each forward pass; part of it may be frozen in half precision."""

    def __init__(self, half):
        super().__init__()
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        if half:
            self.frozen.bfloat16()

    def forward(self, x):
        return self.head(self.features(self.frozen(x) @ torch.eye(8)))


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_modules_that_need_the_precision_context_are_measured(precision, tmp_path):
    spectra = SpectrumLogger(watch=["features"], num_points=5, probe=X)
    probe = OnlineLinearProbe(watch="features", num_classes=2)
    trainer = fit(NeedsContext(precision == "bf16-mixed"), tmp_path, spectra, probe, precision=precision, max_epochs=1)
    assert spectra.record.steps[-1] == 4 and spectra.record.eigenvalues("covariance").isfinite().all()
    assert "train/probe_loss" in trainer.logged_metrics and torch.get_default_dtype() == torch.float32


def test_mixed_precision_is_measured_in_float32_if_the_module_permits(tmp_path):
    module, spectra = Classifier(), SpectrumLogger(num_points=2, probe=X)
    expected = embedding_eigenvalues(capture(module, [X], [""])[""][0])
    fit(module, tmp_path, spectra, precision="bf16-mixed", max_epochs=1)
    assert torch.equal(spectra.record.eigenvalues("covariance")[0], expected)


def test_views_keep_their_dtype_if_parameters_have_several():
    assert on_device([X], NeedsContext(half=True))[0].dtype == torch.float32
    assert on_device([X], NeedsContext(half=False).double())[0].dtype == torch.float64


class Student(Classifier):
    """Has a momentum encoder that forward does not run."""

    def __init__(self):
        super().__init__()
        self.teacher = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6)).requires_grad_(False)


def test_momentum_encoder_is_watched_by_the_function_in_the_message(tmp_path):
    with pytest.raises(ValueError, match="'teacher' does not run in forward.*momentum encoder") as error:
        capture(Student(), [X], ["teacher"])
    definition = str(error.value).partition("with: ")[2]
    assert definition == "def teacher(module, view): return module.teacher(view)"
    names = {}
    exec(definition, names)
    spectra = SpectrumLogger(watch=[names["teacher"]])
    fit(Student(), tmp_path, spectra, max_epochs=1)
    assert spectra.record.eigenvalues("teacher.covariance").shape[1] == 6
