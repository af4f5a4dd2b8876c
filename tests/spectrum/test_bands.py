"""Reference bands of synthetic staircases: coverage, runs that leave the band, files."""

import io
import math

import numpy as np
import pytest
import torch

from stepwise_lightning import SpectrumRecord
from stepwise_lightning.errors import UserError
from stepwise_lightning.spectrum import ReferenceBand

THRESHOLD = 0.1


def staircase(seed, factor=1.0, last_step=1200, learned=3, start=1e-6):
    """Return a run whose modes rise to 1 at random steps near 30, 100 and 300, times a factor."""
    steps = np.unique(np.r_[0, np.logspace(0, math.log10(last_step), 60).round()]).astype(int)
    rises = factor * np.array([30, 100, 300]) * np.exp(0.3 * np.random.default_rng(seed).standard_normal(3))
    rises[learned:] = np.inf
    modes = np.maximum(1 / (1 + (np.sort(rises) / np.maximum(steps, 0.1)[:, None]) ** 12), start)
    return SpectrumRecord.of(torch.tensor(0.01 * steps), torch.tensor(modes), steps=torch.tensor(steps))


@pytest.fixture(scope="module")
def band():
    return ReferenceBand("made", "cross_correlation", THRESHOLD, [staircase(seed) for seed in range(10)])


def test_one_of_six_runs_is_outside_the_band_of_the_others():
    """True for every set of n + 1 runs without ties, hence a coverage of n / (n + 1)."""
    runs = [staircase(seed) for seed in range(6)]
    outside = []
    for index, run in enumerate(runs):
        band = ReferenceBand("", "cross_correlation", THRESHOLD, runs[:index] + runs[index + 1 :])
        outside.append(not band.compare(run).inside)
    assert sum(outside) == 1


def fallen(**settings):
    """Return a run whose second and third mode are lost in the end."""
    run = staircase(20, **settings)
    eigenvalues = run.eigenvalues()
    eigenvalues[-5:, 1:] = 1e-6
    return SpectrumRecord.of(run.times, eigenvalues, steps=run.steps)


LEAVING = {
    "fast": (staircase(20, factor=0.2), "mode 1 is learned at step "),
    "one mode": (staircase(20, learned=1), "mode 2 is not learned, expected at step "),
    "none": (staircase(20, learned=0), "mode 1 is not learned, expected at step "),
    "large start": (staircase(20, start=0.02), "mode 1 is large at the start, expected at step "),
    "lost modes": (fallen(), "mode 2 is not learned, expected at step "),
}


@pytest.mark.parametrize(("run", "reason"), LEAVING.values(), ids=LEAVING)
def test_run_that_differs_leaves_the_band(run, reason, band):
    result = band.compare(run)
    assert not result.inside and result.score > result.limit
    assert result.description.startswith(f"outside: {reason}")
    low, high = (int(word) for word in result.description.split()[-3::2])
    mode = int(result.description.split()[2])
    assert low < [30, 100, 300][mode - 1] < high and result.left_at <= high + 1


def test_late_mode_leaves_the_band_at_the_end_of_its_range(band):
    result = band.compare(staircase(20, learned=1))
    references = [run.detect_steps(threshold=THRESHOLD).step_times[1] / 0.01 for run in band.records]
    octaves = np.log2(references)
    expected = (math.log2(1200) - np.median(octaves)) / max(octaves.std(ddof=1), 0.25)
    assert result.score == pytest.approx(expected, rel=1e-6)
    assert result.left_at == pytest.approx(band.limits[1][1])


@pytest.mark.parametrize(
    ("run", "end"),
    [(staircase(20, last_step=20), 20), (staircase(20, last_step=150), 150), (fallen(last_step=20_000), 1200)],
    ids=["before mode 2", "before mode 3", "longer"],
)
def test_run_is_compared_up_to_its_end_or_the_end_of_the_reference_runs(run, end, band):
    assert band.compare(run).description == f"inside up to step {end}"


def test_saved_band_has_the_same_verdicts(band, tmp_path):
    band.save(tmp_path / "made.npz")
    assert (tmp_path / "made.npz").stat().st_size < 5000
    loaded = ReferenceBand.load(tmp_path / "made.npz")
    assert (loaded.name, loaded.matrix, loaded.threshold, len(loaded.records)) == ("made", band.matrix, THRESHOLD, 10)
    np.testing.assert_allclose(loaded.limits, band.limits, rtol=1e-3)
    for run, _ in LEAVING.values():
        assert loaded.compare(run).description == band.compare(run).description


@pytest.mark.parametrize("unit", [1e-7, 1e6])
def test_saved_band_of_eigenvalues_in_any_unit(unit, band, tmp_path):
    """A covariance may be far outside the range of half precision."""

    def scaled(run):
        return SpectrumRecord.of(run.times, unit * run.eigenvalues(), steps=run.steps)

    ReferenceBand("", band.matrix, unit * THRESHOLD, list(map(scaled, band.records))).save(tmp_path / "made.npz")
    loaded = ReferenceBand.load(tmp_path / "made.npz")
    np.testing.assert_allclose(loaded.limits, band.limits, rtol=1e-3)
    for run in [band.records[0], *(run for run, _ in LEAVING.values())]:
        assert loaded.compare(scaled(run)).description == band.compare(run).description


def test_runs_of_different_lengths_keep_their_steps(tmp_path):
    runs = [staircase(seed, last_step=last_step) for seed, last_step in enumerate((450, 1200, 600))]
    ReferenceBand("made", "cross_correlation", THRESHOLD, runs).save(tmp_path / "made.npz")
    for run, loaded in zip(runs, ReferenceBand.load(tmp_path / "made.npz").records, strict=True):
        assert torch.equal(loaded.steps, run.steps) and torch.equal(loaded.times, run.times)
        torch.testing.assert_close(loaded.eigenvalues(), run.eigenvalues(), rtol=1e-3, atol=1e-4)


def test_invalid_band_is_refused(band):
    with pytest.raises(FileNotFoundError, match="no reference band 'other': give a file, or one of .*linear_photos"):
        ReferenceBand.load("other")
    with pytest.raises(ValueError, match="the band made has 3 modes, the run 2"):
        band.compare(TWO_MODES)


TWO_MODES = SpectrumRecord.of(torch.arange(3.0), torch.ones(3, 2))
OTHER_MATRIX = SpectrumRecord.of(torch.arange(3.0), torch.ones(3, 3), matrix="covariance")
ONCE = SpectrumRecord.of(torch.arange(1.0), torch.ones(1, 3))
RUNS = [staircase(seed) for seed in range(3)]
INVALID = {
    "few": (RUNS[:1], THRESHOLD, "at least 3 runs, got 1"),
    "zero": (RUNS, 0, "must be positive and finite, got 0: give a tenth of"),
    "negative": (RUNS, -1, "must be positive and finite, got -1"),
    "infinite": (RUNS, math.inf, "must be positive and finite, got inf"),
    "unknown": (RUNS, math.nan, "must be positive and finite, got nan"),
    "large": (RUNS, 10, "no mode of a reference run crosses the threshold θ = 10: give a tenth of"),
    "small": (RUNS, 1e-7, "no mode of a reference run crosses the threshold θ = 1e-07"),
    "modes": ([*RUNS, TWO_MODES], THRESHOLD, "the same number of modes, got 2, 3"),
    "matrix": ([*RUNS, OTHER_MATRIX], THRESHOLD, "no matrix 'cross_correlation' in this record"),
    "empty": ([*RUNS, SpectrumRecord()], THRESHOLD, "no matrix 'cross_correlation' in this record"),
    "once": ([*RUNS, ONCE], THRESHOLD, "needs two finite measurements up to step 1200, got 1: train longer"),
}


@pytest.mark.parametrize(("runs", "threshold", "message"), INVALID.values(), ids=INVALID)
def test_invalid_reference_runs_are_refused(runs, threshold, message):
    with pytest.raises(ValueError, match=message):
        ReferenceBand("", "cross_correlation", threshold, runs)


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["text", "empty", "cut", "array", "objects", "record", "lengths", "threshold"])
def test_file_that_is_no_band_is_reported_in_one_line(kind, band, tmp_path):
    path = tmp_path / "made.npz"
    band.save(path)
    with np.load(path) as saved:
        arrays = dict(saved)
    damage = {
        "text": lambda: path.write_text("modes"),
        "empty": lambda: path.write_text(""),
        "cut": lambda: path.write_bytes(path.read_bytes()[:700]),
        "array": lambda: path.write_bytes(npy(np.ones(3))),
        "objects": lambda: path.write_bytes(npy(np.array([{}], dtype=object))),
        "record": lambda: RUNS[0].save(path),
        "lengths": lambda: np.savez(path, **arrays | {"step": arrays["step"][1:]}),
        "threshold": lambda: np.savez(path, **arrays | {"threshold": "high"}),
    }
    damage[kind]()
    with pytest.raises(UserError, match=r"made.npz' cannot be read as a reference band \(.*\): write it with") as error:
        ReferenceBand.load(path)
    assert "\n" not in str(error.value)


def test_file_of_any_name_is_saved_and_loaded(band, tmp_path):
    band.save(str(tmp_path / "mine"))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert len(ReferenceBand.load(tmp_path / "mine").records) == 10


def test_diverged_run_is_compared_up_to_its_last_finite_measurement(band):
    run = staircase(20)
    eigenvalues = run.eigenvalues()
    eigenvalues[30:] = math.inf
    result = band.compare(SpectrumRecord.of(run.times, eigenvalues, steps=run.steps))
    assert result.description == f"inside up to step {run.steps[29]}, the last finite measurement"
