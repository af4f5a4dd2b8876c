"""Records in pandas and xarray, and weights in safetensors."""

import json
import sys

import pytest
import torch
from tiny_runs import changed, stepwise, write_images

from stepwise_lightning import SpectrumRecord, load_encoder
from stepwise_lightning.__main__ import main
from stepwise_lightning.spectrum.record import Measurement, Spectrum


@pytest.fixture
def record():
    """Return a record of two matrices of different dimensions with measures, a prediction and embeddings."""
    record = SpectrumRecord()
    for step in range(3):
        spectra = {
            "cross_correlation": Spectrum(torch.tensor([2.0, 1.0]).double() * step, {"effective_rank": 1.5}),
            "encoder.covariance": Spectrum(torch.tensor([3.0, 2.0, 1.0]).double(), {"rankme": 2.0}),
        }
        predicted, embeddings = torch.tensor([4.0, 3.0]) * step, torch.full((2, 5, 2), float(step))
        record.append(Measurement(step, 0.1 * step, 1.0 - step, spectra, predicted, embeddings))
    return record


def test_dataframe_is_tidy(record):
    pytest.importorskip("pandas")
    table = record.to_dataframe()
    assert list(table.columns) == ["step", "time", "matrix", "quantity", "mode", "value"]
    wide = table[(table.matrix == "cross_correlation") & (table.quantity == "eigenvalue")].pivot(
        index="step", columns="mode", values="value"
    )
    torch.testing.assert_close(torch.tensor(wide.to_numpy()), record.eigenvalues())
    assert table[table.quantity == "loss"].value.tolist() == [1.0, 0.0, -1.0]
    assert table[table.quantity == "predicted"].value.tolist() == [0.0, 0.0, 4.0, 3.0, 8.0, 6.0]
    assert table[table.quantity == "rankme"].matrix.unique().tolist() == ["encoder.covariance"]
    assert table["mode"].dtype == "Int64" and not table.value.isna().any()


def test_xarray_has_the_arrays_of_the_record(record):
    pytest.importorskip("xarray")
    data = record.to_xarray()
    assert dict(data.sizes) == {"matrix": 2, "measurement": 3, "mode": 3, "view": 2, "sample": 5, "dimension": 2}
    for matrix in record.matrices:
        values = torch.tensor(data.eigenvalue.sel(matrix=matrix).dropna("mode").values)
        torch.testing.assert_close(values, record.eigenvalues(matrix))
    assert data.effective_rank.sel(matrix="cross_correlation").values.tolist() == [1.5] * 3
    assert data.predicted.dims == ("measurement", "mode") and data.predicted[2, 0] == 8
    assert data.time.values.tolist() == record.times.tolist() and data.step.values.tolist() == [0, 1, 2]


def test_safetensors_restore_the_network_and_have_a_card(tmp_path, monkeypatch, capsys):
    pytest.importorskip("safetensors")
    write_images(tmp_path)
    monkeypatch.chdir(tmp_path)
    encoder = {
        "class_path": "stepwise_lightning.Encoder",
        "init_args": {"out_features": 3, "backbone": "resnet_small", "projector_depth": 2, "hidden_features": 8},
    }
    logger = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": "runs"}}
    callbacks = [
        {"class_path": f"stepwise_lightning.{name}"} for name in ("SpectrumLogger", "OnlineKNN", "LastCheckpoint")
    ]
    changes = {"model.init_args.encoder": encoder, "trainer.logger": logger, "trainer.callbacks": callbacks}
    stepwise("fit", config=changed(changes | {"trainer.max_steps": 4}))
    monkeypatch.setattr(sys, "argv", ["stepwise", "export", "runs/lightning_logs/version_0", "--out=w.safetensors"])
    capsys.readouterr()
    main()
    code, card = capsys.readouterr().out.split("\n\n")[1], (tmp_path / "w.md").read_text(encoding="utf-8")
    names: dict = {}
    exec("\n".join(line.strip() for line in code.splitlines()), names)
    x = torch.randn(2, 3, 4, 4)
    expected = load_encoder("runs/lightning_logs/version_0").backbone.network
    torch.testing.assert_close(names["network"].eval()(x), expected(x))
    versions = json.loads((tmp_path / "runs/lightning_logs/version_0/provenance.json").read_text())["versions"]
    for text in ("stepwise_lightning.BarlowTwins", "| steps | 4, ", "val/knn_", f"torch {versions['torch']}",
                 "| cross_correlation |", "load_file"):  # fmt: skip
        assert text in card, card
