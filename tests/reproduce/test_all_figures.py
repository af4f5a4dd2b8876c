"""All figures with the smoke profile: numbers against the references, report and --resume."""

import json

import pytest

from reproduce.__main__ import main
from reproduce.figures import FIGURES, LONG
from reproduce.reference import differences
from stepwise_lightning import SpectrumRecord

pytestmark = pytest.mark.usefixtures("rendered_figures")

TINY = ["--profile", "smoke", "--seeds", "0", "--crop-size", "6", "--dim", "2"]


@pytest.mark.slow
def test_resume_keeps_a_finished_figure_of_the_same_code(tmp_path, capsys):
    arguments = ["linear_model", *TINY, "--out", str(tmp_path), "--resume"]
    status, path = main(arguments), tmp_path / "linear_model" / "claims.json"
    text, written = path.read_text(encoding="utf-8"), path.stat().st_mtime_ns
    assert main(arguments) == status
    assert "kept" in capsys.readouterr().out and path.stat().st_mtime_ns == written
    digest = json.loads(text)["source_sha256"]
    for changed, warning in (
        (text.replace(digest, 64 * "0"), ""),
        (text[:100], "cannot be read; computing the figure again"),
    ):
        path.write_text(changed, encoding="utf-8")
        assert main(arguments) == status
        printed = capsys.readouterr()
        assert "kept" not in printed.out and warning in printed.err
        again = json.loads(path.read_text(encoding="utf-8"))
        assert again["claims"] == json.loads(text)["claims"] and again["source_sha256"] == digest


@pytest.mark.slow
def test_all_figures_match_the_references_and_share_runs(tmp_path, capsys):
    arguments = ["all", "--profile", "smoke", "--seeds", "0", "--out", str(tmp_path)]
    assert main(arguments) == 0
    assert "error" not in capsys.readouterr().err
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for name in (names := [name for name in FIGURES if name not in LONG]):
        document = json.loads((tmp_path / name / "claims.json").read_text(encoding="utf-8"))
        assert document["claims"] and f"id='{name}'" in page and differences(document) == []
        assert all((tmp_path / name / file).stat().st_size > 1000 for file in ("figure.png", "figure.pdf", "data.csv"))
    assert page.count("data:image/png;base64") == len(names) and "data:image/gif;base64" in page
    # Seed 0: three losses from both initialisations, two without decorrelation, six controls; seed 1: two losses.
    assert len(list((tmp_path / "runs").glob("[!.]*"))) == 6 + 2 + 6 + 2
    steps = SpectrumRecord.load(tmp_path / "runs/vicreg_small_seed0/version_0").detect_steps("covariance")
    runs = json.loads((tmp_path / "three_losses" / "claims.json").read_text(encoding="utf-8"))["runs"]
    assert steps.num_distinct == next(run for run in runs if run["loss"] == "vicreg")["distinct_steps"]
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/claims.json")}
    (tmp_path / "hidden_spectra" / "claims.json").unlink()
    assert main(arguments) == 0  # computes only the missing figure
    again = {path: path.stat().st_mtime_ns for path in kept}
    assert [path.parent.name for path in kept if kept[path] != again[path]] == ["hidden_spectra"]
