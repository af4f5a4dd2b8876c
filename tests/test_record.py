"""What a run has measured: built, asked, written, read back, and read from files of earlier versions."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import stepwise

from stepwise_lightning import SpectrumRecord
from stepwise_lightning.spectrum import detect_steps
from stepwise_lightning.spectrum.record import Measurement, Spectrum

OLD = Path(__file__).parent / "files" / "version_0_1"


def measurement(step: int, *matrices: str, scale: float = 1.0) -> Measurement:
    spectra = {name: Spectrum(scale * torch.tensor([2.0, 1.0]).double(), {"rankme": 1.5}) for name in matrices}
    return Measurement(step, 0.1 * step, spectra=spectra)


def rising() -> SpectrumRecord:
    times = torch.linspace(0, 10, 200, dtype=torch.float64)
    eigenvalues = torch.sigmoid(torch.tensor([8.0, 4.0, 2.0]).double() * times[:, None] * 2 - 14)
    return SpectrumRecord.of(times, eigenvalues, losses=3 - eigenvalues.sum(1))


def test_what_is_put_in_comes_out():
    record = SpectrumRecord()
    record.append(measurement(0, "covariance", scale=1e-3))
    record.set_loss(4.0)
    record.append(measurement(5, "covariance"))
    assert len(record) == 2 and record.matrices == ["covariance"] and record.steps.tolist() == [0, 5]
    assert record.times.tolist() == [0, 0.5] and record.losses[0] == 4 and math.isnan(record.losses[1])
    assert record.eigenvalues("covariance").tolist() == [[2e-3, 1e-3], [2, 1]]
    assert record.measure("num_grown", "covariance").tolist() == [0, 2]
    grown = [row for row in record.rows(1) if row[3] == "grown_at"]
    assert grown == [(5, 0.5, "covariance", "grown_at", 0, 0.5), (5, 0.5, "covariance", "grown_at", 1, 0.5)]
    assert [row[3:] for row in record.rows(0, 1)] == [
        ("num_grown", "", 0), ("rankme", "", 1.5), ("eigenvalue", 0, 2e-3), ("loss", "", 4.0),
    ]  # fmt: skip


def test_what_was_not_measured_is_nan():
    record = SpectrumRecord()
    record.append(measurement(0, "covariance"))
    record.append(measurement(1, "covariance", "head.covariance"))
    record.append(measurement(2, "head.covariance"))
    assert record.eigenvalues("head.covariance").isnan().all(1).tolist() == [True, False, False]
    assert record.eigenvalues("covariance").isnan().all(1).tolist() == [False, False, True]
    assert record.measure("rankme", "head.covariance").isnan().tolist() == [True, False, False]
    restored = SpectrumRecord.from_arrays(record.arrays())
    assert [row for i in range(3) for row in restored.rows(i)] == [row for i in range(3) for row in record.rows(i)]


def test_steps_are_those_that_the_detector_finds():
    record = rising()
    assert record.detect_steps().num_distinct == 3
    expected = detect_steps(record.times, record.eigenvalues())
    torch.testing.assert_close(record.detect_steps().step_times, expected.step_times, rtol=0, atol=0)


def test_measurements_at_which_time_stood_still_do_not_hide_the_steps():
    record, still = rising(), SpectrumRecord()
    for step in range(3):
        still.append(Measurement(step, 0.0, spectra={"cross_correlation": Spectrum(record.eigenvalues()[0])}))
    for index in range(1, len(record)):
        spectra = {"cross_correlation": Spectrum(record.eigenvalues()[index])}
        still.append(Measurement(index + 2, float(record.times[index]), spectra=spectra))
    assert torch.equal(still.detect_steps().step_times, record.detect_steps().step_times)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    record = rising()
    record.predict(0.5 * record.eigenvalues())
    record.save(tmp_path / "spectrum.npz")
    for path in (tmp_path, str(tmp_path / "spectrum.npz")):
        loaded = SpectrumRecord.load(path)
        assert loaded.arrays().keys() == record.arrays().keys()
        for name, values in record.arrays().items():
            torch.testing.assert_close(loaded.arrays()[name], values, rtol=0, atol=0, equal_nan=True)


def test_unknown_names_are_answered_with_those_that_exist(tmp_path):
    record = rising()
    with pytest.raises(ValueError, match="no matrix 'covarianc' in this record; choose from: cross_correlation"):
        record.eigenvalues("covarianc")
    with pytest.raises(ValueError, match="no measure 'rank'"):
        record.measure("rank")
    with pytest.raises(ValueError, match=r"SpectrumLogger\(keep_embeddings=True\)"):
        record.embeddings(0)
    with pytest.raises(FileNotFoundError, match="whose training has ended"):
        SpectrumRecord.load(tmp_path)


def test_files_of_version_0_1_are_read():
    record = SpectrumRecord.load(OLD)
    with np.load(OLD / "spectrum.npz") as saved:
        np.testing.assert_array_equal(record.eigenvalues("encoder.1.covariance"), saved["encoder.1.covariance"])
        np.testing.assert_array_equal(record.measure("num_grown"), saved["cross_correlation/num_learned"])
        np.testing.assert_array_equal(record.embeddings(3), saved["embeddings"][3])
    assert record.steps[-1] == 20 and "num_learned" not in record.measures()


def test_a_run_begun_by_version_0_1_is_continued(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs/old/version_0"
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copy(OLD / "last.ckpt", folder / "checkpoints")  # after 10 steps of 20
    shutil.copy(OLD / "config.yaml", folder)
    stepwise("fit", "--config", folder / "config.yaml", "--ckpt_path=last")
    continued, whole = SpectrumRecord.load(folder), SpectrumRecord.load(OLD)
    assert torch.equal(continued.steps, whole.steps)
    for matrix in whole.matrices:
        torch.testing.assert_close(continued.eigenvalues(matrix), whole.eigenvalues(matrix), rtol=1e-3, atol=1e-12)
    torch.testing.assert_close(continued.losses, whole.losses, rtol=1e-5, atol=0, equal_nan=True)
