"""Training with a compiled encoder equals uncompiled training, with the same files and names."""

import numpy as np
import pytest
import torch
from tiny_runs import changed, stepwise, write_images
from torch._dynamo.utils import counters

from stepwise_lightning import BarlowTwins, Encoder, ForecastLogger, SimCLR, SpectrumLogger, VICReg, load_encoder
from stepwise_lightning.__main__ import main
from stepwise_lightning.encoders import MLP

MLP_ENCODER = {
    "class_path": "stepwise_lightning.encoders.MLP",
    "init_args": {"in_features": 48, "hidden": [8], "out_features": 3},
}
FOUR_STEPS = {"model.init_args.encoder": MLP_ENCODER, "trainer.max_steps": 4}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def arrays(run):
    with np.load(run / "spectrum.npz") as saved:
        return {name: saved[name] for name in saved.files}


def assert_equal_runs(one, two):
    checkpoints = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (one, two)]
    weights = [checkpoint["state_dict"] for checkpoint in checkpoints]
    assert weights[0].keys() == weights[1].keys() and checkpoints[0]["global_step"] == checkpoints[1]["global_step"]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    ours, theirs = arrays(one), arrays(two)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_compiled_run_has_the_files_of_an_uncompiled_run_and_resumes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path)
    config, name = changed(FOUR_STEPS), "--trainer.logger.init_args.name="
    stepwise("fit", f"{name}eager", config=config)
    assert not counters["stats"]
    compiled = "--model.compile=aot_eager"
    stepwise("fit", f"{name}compiled", compiled, config=config)
    assert counters["stats"]["unique_graphs"] == 1  # both views run the same graph
    stepwise("fit", f"{name}resumed", compiled, "--trainer.max_steps=2", config=config)
    stepwise("fit", f"{name}resumed", "--ckpt_path=last", config=config)  # uncompiled
    eager, *others = (tmp_path / "runs" / name / "version_0" for name in ("eager", "compiled", "resumed"))
    for run in others:
        assert_equal_runs(eager, run)
    x = torch.randn(5, 3, 4, 4)
    assert torch.equal(load_encoder(others[0])(x), load_encoder(eager)(x))
    assert "compile" not in BarlowTwins.load_from_checkpoint(others[0] / "checkpoints" / "last.ckpt").hparams


def test_compiled_encoder_records_training_batches_for_forecasts(tmp_path, monkeypatch):
    """The forecast of SimCLR uses the last layer's inputs of training batches, recorded by a hook."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path)
    spectra = {"class_path": "stepwise_lightning.SpectrumLogger", "init_args": {"matrices": ["tangent_covariance"]}}
    config = changed(
        FOUR_STEPS | {
            "model.class_path": "stepwise_lightning.SimCLR",
            "trainer.callbacks": [spectra, {"class_path": "stepwise_lightning.ForecastLogger"}],
        }
    )  # fmt: skip
    recorded = []
    monkeypatch.setattr(
        ForecastLogger, "on_train_end", lambda self, *_: recorded.append([view.clone() for view in self._trained])
    )
    stepwise("fit", config=config)
    limits = {"fail_on_recompile_limit_hit": True, "recompile_limit": 2}
    if torch.__version__ < (2, 7):
        limits = {"fail_on_cache_limit_hit": True, "cache_size_limit": 2}
    with torch._dynamo.config.patch(limits):
        stepwise("fit", "--model.compile=aot_eager", config=config)
    assert counters["stats"]["unique_graphs"] >= 1
    assert [len(views) for views in recorded] == [8, 8]
    assert all(torch.equal(*pair) for pair in zip(*recorded, strict=True))


@pytest.mark.parametrize(
    ("method", "encoder"),
    [
        (BarlowTwins, lambda: MLP(48, [8], 3)),
        *(pytest.param(method, lambda: MLP(48, [8], 3), marks=pytest.mark.slow) for method in (SimCLR, VICReg)),
        pytest.param(BarlowTwins, lambda: Encoder(3), marks=pytest.mark.slow),
    ],
)
@pytest.mark.skipif(torch.__version__ < (2, 11), reason="torch 2.6 breaks the graph at torch.amp.is_autocast_available")
def test_loss_of_both_views_compiles_to_one_graph(method, encoder):
    module, views = method(encoder(), learning_rate=0.1), torch.randn(2, 4, 3, 4, 4)

    def step(x1, x2):
        return module.loss(module(x1), module(x2))

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)(*views)  # raises at a graph break
    torch.testing.assert_close(compiled, step(*views))


@pytest.mark.slow
@pytest.mark.filterwarnings(r"ignore:\s*Only use the public API")  # pickle searches every module, also of jsonargparse
def test_compiled_resnet_measures_the_spectra_of_an_uncompiled_one(tmp_path, monkeypatch):
    """With the default backend, which rounds differently."""
    monkeypatch.chdir(tmp_path)
    fit = ["stepwise", "fit", "--config=barlow_twins_photos", "--trainer.max_steps=3", "--trainer.logger=false"]
    records = []
    monkeypatch.setattr(SpectrumLogger, "on_train_end", lambda self, *_: records.append(self.record))
    for compiled in ("false", "true"):
        monkeypatch.setattr("sys.argv", [*fit, f"--model.compile={compiled}"])
        main()
    for matrix in records[0].matrices:
        one, two = (record.eigenvalues(matrix) for record in records)
        assert (one - two).abs().max() < 1e-5 * one.max()
