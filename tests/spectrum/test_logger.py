"""SpectrumLogger on a supervised classifier: record, files, TensorBoard, and activation capture."""

import csv

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from reproduce.networks.variants import LOSS_SETTINGS
from stepwise_lightning import BarlowTwins, SimCLR, SpectrumLogger, SpectrumRecord, VICReg
from stepwise_lightning.callbacks.run_files import rows
from stepwise_lightning.callbacks.tensorboard import PrimaryMatrix, layout, log_settings, measured_scalars
from stepwise_lightning.features import capture
from stepwise_lightning.features.module_state import batch_statistics
from stepwise_lightning.spectrum import MATRICES, embedding_eigenvalues


class Classifier(L.LightningModule):
    """Supervised model with batch normalisation and dropout."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.features(x))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[-1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def fit(directory, callbacks):
    L.seed_everything(3, verbose=False)
    module = Classifier()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=generator)
    data = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=16)
    logger = TensorBoardLogger(directory)
    trainer = L.Trainer(
        max_epochs=5, accelerator="cpu", logger=logger, callbacks=callbacks, log_every_n_steps=1,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(module, data)
    return module, logger


@pytest.fixture(scope="module")
def run(tmp_path_factory, rendered_figures):
    spectra = SpectrumLogger(watch=["features", "features.0"], num_points=12)
    module, logger = fit(tmp_path_factory.mktemp("logs"), [spectra])
    return spectra, module, logger


def test_supervised_classifier_is_measured_without_changes(run):
    spectra, module, _ = run
    expected = {name + matrix for name in ("", "features.", "features.0.") for matrix in ("covariance",)}
    expected |= {name.replace("covariance", "normalized_covariance") for name in expected}
    assert set(spectra.record.matrices) == expected  # no cross-correlation: the batch has one view
    assert spectra.record.eigenvalues("features.covariance").shape == (len(spectra.record), 6)
    assert spectra.record.eigenvalues("covariance").shape == (len(spectra.record), 3)


def test_training_is_bit_identical_without_the_callback(run, tmp_path):
    plain, _ = fit(tmp_path, [])
    for ours, theirs in zip(run[1].state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def custom_charts(events):
    """Return the tags of TensorBoard's custom charts by category and chart; check that the tags exist."""
    content = Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    tags = {
        (category.title, chart.title): [series.value for series in chart.margin.series]
        for category in content.category
        for chart in category.chart
    }
    for shown in tags.values():
        assert shown and set(shown) <= set(events.Tags()["scalars"])
    return tags


def test_tensorboard_has_charts_per_matrix_and_the_figure(run):
    spectra, _, logger = run
    events = EventAccumulator(logger.log_dir, size_guidance={"tensors": 0, "images": 0}).Reload()
    charts = custom_charts(events)
    assert charts["features, all eigenvalues", "covariance"] == [
        f"features/covariance/eig_{mode:03d}" for mode in range(6)
    ]
    assert not any("driven" in chart for _, chart in charts)  # the driven matrix of this loss is unknown
    assert spectra.picture == spectra.directory / "trajectories.png" and spectra.picture.exists()
    images = events.Images("At a glance/trajectories")
    assert images[-1].step == spectra.record.steps[-1] and images[-1].width > 500
    for measure in ("num_grown", "effective_rank", "participation_ratio", "alpha_req", "rankme"):
        assert len(events.Scalars(f"covariance/{measure}")) == len(spectra.record)


def test_prefix_of_the_logger_starts_all_tags_and_those_in_custom_charts(tmp_path):
    spectra = SpectrumLogger(name="mine", num_points=4, prediction=lambda times: torch.ones(len(times), 3))
    logger = TensorBoardLogger(tmp_path, prefix="a.b")
    trainer = L.Trainer(
        max_steps=4, accelerator="cpu", logger=logger, callbacks=[spectra], log_every_n_steps=1,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    log_settings(trainer, {"alpha": 1e-3}, "mine")
    trainer.fit(Classifier(), DataLoader(TensorDataset(x, x, (x[:, 0] > 0).long()), batch_size=16))
    events = EventAccumulator(logger.log_dir, size_guidance={"tensors": 0}).Reload()
    assert len(custom_charts(events)) >= 6 and all(tag.startswith("a.b-") for tag in events.Tags()["scalars"])
    settings = events.summary_metadata["_hparams_/experiment"].plugin_data.content
    metrics = HParamsPluginData.FromString(settings).experiment.metric_infos
    assert {metric.name.tag for metric in metrics} <= set(events.Tags()["scalars"])
    theory = EventAccumulator(f"{logger.log_dir}/theory").Reload().Tags()["scalars"]
    assert theory == [f"a.b-mine/C/eig_{mode:03d}" for mode in range(3)]


@pytest.mark.parametrize("module", [BarlowTwins, VICReg, SimCLR])
def test_driven_matrix_comes_first(module):
    primary = PrimaryMatrix.of(module(nn.Linear(2, 2), 0.1), list(MATRICES))
    assert primary.matrix == module.driven_matrix == LOSS_SETTINGS[module.loss_name].matrix
    charts = list(layout(dict.fromkeys(MATRICES, 2), primary, "spectrum").items())
    assert charts[0][0] == "At a glance" and list(charts[0][1])[-1].endswith(f", driven by {module.__name__}")
    assert list(charts[1][1]) == ["mode 0", "mode 1"]
    assert PrimaryMatrix.of(module(nn.Linear(2, 2), 0.1), ["encoder.covariance"]) == PrimaryMatrix("encoder.covariance")


def test_submodules_have_sixteen_scalars_and_all_rows():
    record = SpectrumRecord.of(torch.arange(2.0), torch.ones(2, 40), matrix="encoder.covariance")
    tags = [tag for tag in measured_scalars(record, -1, "encoder.covariance") if "eig" in tag]
    assert tags == [f"encoder/covariance/eig_{mode:03d}" for mode in range(16)]
    assert len(rows(record, -1)) == 40


def test_growth_of_a_mode_is_written_at_its_step(tmp_path):
    class Growing(Classifier):
        """The output of one direction grows a thousandfold."""

        def forward(self, x):
            step = self.global_step if self._trainer else 0
            return x[:, :2] * torch.tensor([1.0, 1e-3]) * min(10.0 ** (step - 8), 1.0) + 0 * self.head.weight.sum()

        def training_step(self, batch, batch_idx):
            return self(batch[0]).square().mean()

    data = DataLoader(torch.utils.data.StackDataset(torch.randn(64, 8, generator=torch.Generator().manual_seed(0))), 16)
    spectra = SpectrumLogger(num_points=20)
    trainer = L.Trainer(
        max_epochs=5, accelerator="cpu", logger=TensorBoardLogger(tmp_path), callbacks=[spectra], log_every_n_steps=1,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(Growing(), data)
    with (spectra.directory / "spectrum.csv").open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["quantity"] == "grown_at" and r["matrix"] == "covariance"]
    assert [(row["mode"], int(row["step"])) for row in rows] == [("0", 1)]
    assert spectra.record.measure("num_grown", "covariance")[[0, -1]].tolist() == [0, 1]


def test_num_scalars_limits_the_csv_but_not_the_npz(tmp_path):
    spectra = SpectrumLogger(watch=["features"], num_points=5, num_scalars=2)
    fit(tmp_path, [spectra])
    with np.load(spectra.directory / "spectrum.npz") as saved:
        assert saved["features.covariance"].shape[1] == 6
        assert saved["features.covariance/rankme"].shape == saved["step"].shape
    with (spectra.directory / "spectrum.csv").open(newline="") as file:
        modes = {row["mode"] for row in csv.DictReader(file) if row["quantity"] == "eigenvalue"}
    assert modes == {"0", "1"}


def test_capture_uses_batch_statistics_and_restores_the_state():
    module = Classifier().train()
    module.head.eval()  # a mixed mode, to be restored
    before = {name: value.clone() for name, value in module.state_dict().items()}
    modes, state = [part.training for part in module.modules()], torch.get_rng_state()
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    outputs = capture(module, [x, 2 * x], ["", "features.1"])
    normalised = outputs["features.1"][0]
    torch.testing.assert_close(normalised.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalised.var(0, unbiased=False), torch.ones(6), atol=1e-3, rtol=0)
    assert len(outputs[""]) == 2 and not outputs[""][0].requires_grad
    assert [part.training for part in module.modules()] == modes and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(part.track_running_stats for part in module.modules() if isinstance(part, nn.BatchNorm1d))


def test_captured_activations_are_not_overwritten_in_place():
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True))
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    captured = capture(net, [x], ["0"])["0"][0]
    assert captured.min() < 0 and torch.equal(captured, net[0](x))


def test_batch_statistics_restores_modes_after_an_error():
    module = Classifier()
    with pytest.raises(RuntimeError), batch_statistics(module):
        assert not module.features[3].training and module.features[1].training
        raise RuntimeError
    assert all(part.training for part in module.modules())


def test_probe_tensor_is_measured(tmp_path):
    probe = torch.randn(20, 8, generator=torch.Generator().manual_seed(5))
    spectra = SpectrumLogger(probe=probe, num_points=3)
    module, _ = fit(tmp_path, [spectra])
    expected = embedding_eigenvalues(capture(module, [probe], [""])[""][0])
    torch.testing.assert_close(spectra.record.eigenvalues("covariance")[-1], expected)


def test_invalid_settings_raise_and_list_the_valid_ones(tmp_path):
    with pytest.raises(ValueError, match="no submodule 'featurs' to watch; did you mean one of: features"):
        fit(tmp_path, [SpectrumLogger(watch=["featurs"])])
    for arguments, message in (
        ({"num_points": 1}, "num_points must be at least 2, got 1"),
        ({"num_scalars": -1}, "num_scalars must be at least 0, got -1"),
        ({"probe": "val"}, "'auto', 'batch'"),
        ({"matrices": ["gram"]}, "unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            SpectrumLogger(**arguments)
