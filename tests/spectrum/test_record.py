"""SpectrumRecord: construction, access, saving and loading; rows of ``spectrum.csv``."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch

from stepwise_lightning import SpectrumLogger, SpectrumRecord
from stepwise_lightning.callbacks.run_files import rows
from stepwise_lightning.errors import UserError
from stepwise_lightning.spectrum import detect_steps
from stepwise_lightning.spectrum.record import Measurement, Spectrum


def measurement(step: int, *matrices: str, scale: float = 1.0) -> Measurement:
    spectra = {name: Spectrum(scale * torch.tensor([2.0, 1.0]).double(), {"rankme": 1.5}) for name in matrices}
    return Measurement(step, 0.1 * step, spectra=spectra)


def rising() -> SpectrumRecord:
    times = torch.linspace(0, 10, 200, dtype=torch.float64)
    eigenvalues = torch.sigmoid(torch.tensor([8.0, 4.0, 2.0]).double() * times[:, None] * 2 - 14)
    return SpectrumRecord.of(times, eigenvalues, losses=3 - eigenvalues.sum(1))


def test_record_returns_appended_measurements():
    record = SpectrumRecord()
    record.append(measurement(0, "covariance", scale=1e-3))
    record.set_loss(4.0)
    record.append(measurement(5, "covariance"))
    assert len(record) == 2 and record.matrices == ["covariance"] and record.steps.tolist() == [0, 5]
    assert record.times.tolist() == [0, 0.5] and record.losses[0] == 4 and math.isnan(record.losses[1])
    assert record.eigenvalues("covariance").tolist() == [[2e-3, 1e-3], [2, 1]]
    assert record.measure("num_grown", "covariance").tolist() == [0, 2]


def test_csv_rows_contain_measures_growth_eigenvalues_and_loss():
    record = SpectrumRecord()
    record.append(measurement(0, "covariance", scale=1e-3))
    record.set_loss(4.0)
    record.append(measurement(5, "covariance"))
    for index in (1, -1):
        grown = [row for row in rows(record, index) if row[3] == "grown_at"]
        assert grown == [(5, 0.5, "covariance", "grown_at", 0, 0.5), (5, 0.5, "covariance", "grown_at", 1, 0.5)]
    assert [row[3:] for row in rows(record, 0, 1)] == [
        ("num_grown", "", 0), ("rankme", "", 1.5), ("eigenvalue", 0, 2e-3), ("loss", "", 4.0),
    ]  # fmt: skip


def test_missing_measurements_are_nan():
    record = SpectrumRecord()
    record.append(measurement(0, "covariance"))
    record.append(measurement(1, "covariance", "head.covariance"))
    record.append(measurement(2, "head.covariance"))
    assert record.eigenvalues("head.covariance").isnan().all(1).tolist() == [True, False, False]
    assert record.eigenvalues("covariance").isnan().all(1).tolist() == [False, False, True]
    assert record.measure("rankme", "head.covariance").isnan().tolist() == [True, False, False]
    restored = SpectrumRecord.from_arrays(record.arrays())
    assert [rows(restored, i) for i in range(3)] == [rows(record, i) for i in range(3)]


def test_detect_steps_equals_the_function():
    record = rising()
    assert record.detect_steps().num_distinct == 3
    expected = detect_steps(record.times, record.eigenvalues())
    torch.testing.assert_close(record.detect_steps().step_times, expected.step_times, rtol=0, atol=0)


def test_detect_steps_uses_the_last_of_several_measurements_at_one_time():
    record, constant = rising(), SpectrumRecord()
    for step in range(3):
        constant.append(Measurement(step, 0.0, spectra={"cross_correlation": Spectrum(record.eigenvalues()[0])}))
    for index in range(1, len(record)):
        spectra = {"cross_correlation": Spectrum(record.eigenvalues()[index])}
        constant.append(Measurement(index + 2, float(record.times[index]), spectra=spectra))
    assert torch.equal(constant.detect_steps().step_times, record.detect_steps().step_times)


def test_save_and_load_preserve_all_arrays(tmp_path):
    record = rising()
    record.predict(0.5 * record.eigenvalues())
    record.save(tmp_path / "spectrum.npz")
    for path in (tmp_path, str(tmp_path / "spectrum.npz")):
        loaded = SpectrumRecord.load(path)
        assert loaded.arrays().keys() == record.arrays().keys()
        for name, values in record.arrays().items():
            torch.testing.assert_close(loaded.arrays()[name], values, rtol=0, atol=0, equal_nan=True)


def test_unknown_names_raise_and_list_the_known_ones(tmp_path):
    record = rising()
    with pytest.raises(ValueError, match="no matrix 'covarianc' in this record; choose from: cross_correlation"):
        record.eigenvalues("covarianc")
    with pytest.raises(ValueError, match="no measure 'rank'"):
        record.measure("rank")
    with pytest.raises(ValueError, match=r"SpectrumLogger\(keep_embeddings=True\)"):
        record.embeddings(0)
    with pytest.raises(FileNotFoundError, match="pass a spectrum.npz, or the folder of a finished run"):
        SpectrumRecord.load(tmp_path)


def test_arrays_of_version_0_1_have_num_learned_renamed():
    arrays = rising().arrays() | {"cross_correlation/num_learned": torch.ones(200)}
    assert SpectrumRecord.from_arrays(arrays).measures() == ["num_grown"]


def test_checkpoint_of_version_0_1_is_refused():
    trainer = SimpleNamespace(state=SimpleNamespace(fn="fit"))
    with pytest.raises(ValueError, match="written by stepwise_lightning 0.1: resume it with version 0.1"):
        SpectrumLogger().on_load_checkpoint(trainer, None, {"callbacks": {"SpectrumLogger": {"steps": []}}})


@pytest.mark.parametrize(("method", "package"), [("to_dataframe", "pandas"), ("to_xarray", "xarray")])
def test_missing_packages_are_named_in_one_line(method, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"^{package} is not installed: pip install {package}$"):
        getattr(SpectrumRecord(), method)()
