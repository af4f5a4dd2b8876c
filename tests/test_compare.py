"""The command compare on runs with and without a reference band."""

import sys

import pytest
import torch
from matplotlib.image import imread

from stepwise_lightning import SpectrumRecord
from stepwise_lightning.__main__ import main
from stepwise_lightning.commands.compare import band_of, compared, table
from stepwise_lightning.plots import ComparedRun
from stepwise_lightning.spectrum import ReferenceBand


def compare(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["stepwise", "compare", *map(str, arguments)])
        main()


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch, rendered_figures):
    """Write a reference run of linear_photos, the same run with eight times the steps, and an unrelated run."""
    monkeypatch.chdir(tmp_path)
    run = ReferenceBand.load("linear_photos").records[0]
    slow = SpectrumRecord.of(run.times, run.eigenvalues(), steps=8 * run.steps)
    for path, record in (("linear_photos/version_0", run), ("linear_photos/version_1", slow), ("x/version_0", run)):
        (tmp_path / "runs" / path).mkdir(parents=True)
        record.save(tmp_path / "runs" / path / "spectrum.npz")


def test_modes_and_verdicts_of_runs_are_printed_and_drawn(capsys):
    compare("runs/linear_photos/version_0", "runs/linear_photos/version_1", "runs/x/version_0")
    head, *rows, blank, inside, outside, unknown, picture = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["run", "matrix", "mode", "step"] and not blank
    assert len(rows) == 30 and rows[0].split() == [
        "linear_photos/version_0",
        "cross_correlation",
        "1",
        "39.8",
        "1",
        "1",
    ]
    assert rows[9].split()[3].isdecimal() and int(rows[9].split()[3]) > 20_000
    first, second = (float(rows[index].split()[4]) for index in (1, 11))
    assert first == second > 5  # in units of the first mode
    assert inside == "linear_photos/version_0: inside up to step 25000 (linear_photos, 10 seeds)"
    assert outside.startswith("linear_photos/version_1: outside: mode 1 is learned at step 319, expected at step ")
    assert unknown == "x/version_0: no reference band"
    assert picture == "compare.png" and imread(picture).shape[1] > 1000  # a column for each band


def test_runs_that_do_not_fit_the_band_have_a_verdict_and_others_are_compared(tmp_path, capsys):
    run = SpectrumRecord.load("runs/x/version_0")
    values, steps = run.eigenvalues(), run.steps
    changed = {
        "few": SpectrumRecord.of(run.times, values[:, :4], steps=steps),
        "other": SpectrumRecord.of(run.times, values, matrix="covariance", steps=steps),
        "once": SpectrumRecord.of(run.times[:1], values[:1], steps=steps[:1]),
        "empty": SpectrumRecord(),
        "short": SpectrumRecord.of(run.times[:40], values[:40], steps=steps[:40]),
        "long": SpectrumRecord.of(run.times, values, steps=torch.cat([steps[:-1], steps[-1:] * 4])),
    }
    for name, record in changed.items():
        record.save(tmp_path / name)
    ReferenceBand.load("linear_photos").save(tmp_path / "mine.npz")
    compare(*changed, "--band", "mine.npz", "--out", "mine.png")
    text = capsys.readouterr().out
    rows, (*verdicts, picture) = (part.splitlines() for part in text.split("\n\n"))
    assert picture == "mine.png" and imread(picture).shape[1] > 2000  # the band, without it, covariance
    assert {row.split()[0] for row in rows[1:]} == {"few", "other", "short", "long"}
    assert verdicts == [
        "few: not comparable: the band mine has 10 modes, the run 4: give another band",
        "other: not comparable: no matrix 'cross_correlation' in this record; choose from: covariance",
        "once: not comparable: times must be ascending, with at least two samples, got 1 samples",
        "empty: not comparable: no eigenvalues in this record: train again, with a lower learning rate if it diverged",
        f"short: inside up to step {steps[39]} (mine, 10 seeds)",
        "long: inside up to step 25000 (mine, 10 seeds)",
    ]
    with pytest.raises(SystemExit, match="empty: not comparable: no eigenvalues in this record"):
        compare("empty")


def test_band_is_of_the_parent_folder_and_of_its_matrix(tmp_path, capsys):
    nested = tmp_path / "runs/linear_photos/runs/x/version_0/spectrum.npz"
    SpectrumRecord.load("runs/x/version_0").save(nested)
    for path, name in (("runs/linear_photos/version_0", "linear_photos"), ("runs/x/version_0", None)):
        for file in ("", "spectrum.npz"):
            assert getattr(band_of(str(tmp_path / path / file), None), "name", None) == name
    assert band_of(str(nested), None) is band_of(str(nested.parent), None) is None
    run, band = SpectrumRecord.load("runs/x/version_0"), ReferenceBand.load("linear_photos")
    assert compared("", run, band, "cross_correlation")[2].startswith("inside up to step")
    run = SpectrumRecord.of(run.times, run.eigenvalues(), matrix="covariance")
    assert compared("", run, band, "covariance")[2] == "no reference band of covariance"
    with pytest.raises(SystemExit, match="no matrix 'covariance' in this record; choose from: cross_correlation"):
        compare("runs/linear_photos/version_0", "--matrix", "covariance")
    with pytest.raises(SystemExit):
        compare("runs/x/version_0", "--matrix", "covariance", "--band", "linear_photos")
    assert "not allowed with argument" in capsys.readouterr().err


def test_run_without_modes_has_one_row_and_a_verdict():
    flat = SpectrumRecord.of(torch.arange(1.0, 5), torch.full((4, 10), 1e-9), steps=10_000 * torch.arange(4))
    run = ComparedRun("flat", flat, "cross_correlation", band_of("runs/x/version_0", "linear_photos"))
    assert table(run) == [("flat", "cross_correlation", "none", "–", "–", "–")]
    assert run.verdict.startswith("outside: mode 1 is not learned, expected at step ")


def test_unknown_band_is_reported_in_one_line():
    with pytest.raises(SystemExit, match="no reference band 'y': give a file, or one of .*linear_photos"):
        compare("runs/x/version_0", "--band", "y")
