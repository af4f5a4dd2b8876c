"""Long figures with the smoke profile."""

import json
from pathlib import Path

import pytest

from reproduce.__main__ import main
from reproduce.figures import FIGURES, LONG, middle_scale
from reproduce.networks.variants import ALL_LOSS_SETTINGS
from stepwise_lightning import SpectrumRecord

pytestmark = pytest.mark.usefixtures("rendered_figures")
STORED = Path(__file__).parents[2] / "reproduce" / "results" / "middle_scale"


def test_stored_runs_of_the_middle_scale_have_the_documented_steps():
    folders = sorted(path.parent for path in STORED.glob("*/spectrum.npz"))
    counts = {}
    for folder in folders:
        loss, start = folder.name.removesuffix("_seed0").rsplit("_", 1)
        steps = SpectrumRecord.load(folder).detect_steps(ALL_LOSS_SETTINGS[loss].matrix)
        counts[loss, start] = int(steps.num_learned.max()), steps.num_distinct, steps.num_plateaus
        rows = json.loads((folder / "accuracies_5000_1000.json").read_text(encoding="utf-8"))
        assert [row[5] for row in rows[::4]][:-1] == sorted({row[5] for row in rows})
        assert rows[-1][5] <= counts[loss, start][0]
    assert counts[("barlow_twins", "small")] == (32, 25, 6) and counts[("barlow_twins", "ordinary")] == (32, 1, 1)
    assert counts[("vicreg", "small")] == (8, 7, 2)
    assert counts[("simclr", "small")] == (17, 9, 1) and counts[("simclr", "ordinary")] == (18, 0, 0)
    assert counts[("spectral_contrastive", "small")] == (31, 8, 4)


@pytest.mark.slow
def test_long_figures_run(tmp_path, capsys):
    names = [name for name in LONG if "smoke" in FIGURES[name].profiles]
    assert set(names) == {"conditions", "forecast", "stable_rates"}
    # The bounds are for the cpu profile: a claim may fail here.
    assert main([*names, "--profile", "smoke", "--seeds", "0", "--out", str(tmp_path)]) in (0, 1)
    assert "error" not in capsys.readouterr().err
    documents = {name: json.loads((tmp_path / name / "claims.json").read_text(encoding="utf-8")) for name in names}
    for name, document in documents.items():
        assert document["claims"]
        assert all((tmp_path / name / file).stat().st_size > 1000 for file in ("figure.png", "figure.pdf", "data.csv"))

    stable = documents["stable_rates"]["runs"]
    assert {run["kind"] for run in stable} == {"barlow_twins", "barlow_twins_momentum", "vicreg"}
    assert all(run["trained at 0.8 safe"] == 1 for run in stable)
    assert all(run["at 1.25 limit"] == 0 for run in stable if run["kind"] != "vicreg")
    first = {claim["name"]: claim for claim in documents["forecast"]["claims"]}
    for loss in ("barlow_twins", "vicreg"):
        scheduled = first[f"{loss}_schedule"]
        assert scheduled["measured"] < 0.15 < scheduled["control_value"]


@pytest.mark.slow
def test_middle_scale_measures_accuracies_and_keeps_them(tmp_path, capsys):
    arguments = ["middle_scale", "--profile", "tiny", "--seeds", "0", "--out", str(tmp_path), "--resume"]
    assert main(arguments) in (0, 1)
    path, runs = tmp_path / "middle_scale" / "claims.json", sorted((tmp_path / "runs").glob("[!.]*"))
    names = [f"{loss}_{start}_seed0" for loss in sorted(ALL_LOSS_SETTINGS) for start in ("ordinary", "small")]
    assert [run.name for run in runs] == names
    document = json.loads(path.read_text(encoding="utf-8"))
    assert [claim["name"] for claim in document["claims"]] == [f"{loss}_separation" for loss in ALL_LOSS_SETTINGS]
    untrained = [row for row in document["settings"]["accuracies"] if row["modes"] == 0]
    assert len(untrained) == len(names) * 4 and all(0 < row["mean"] < 1 for row in untrained)
    assert len(document["settings"]["small_minus_ordinary"]) == 16

    kept = {file: file.stat().st_mtime_ns for file in tmp_path.glob("runs/*/accuracies_60_30.json")}
    path.unlink()
    assert main(arguments) in (0, 1) and len(kept) == 8
    assert kept == {file: file.stat().st_mtime_ns for file in kept}
    again = json.loads(path.read_text(encoding="utf-8"))
    assert again["claims"] == document["claims"] and again["settings"] == document["settings"]


def test_accuracies_of_middle_scale():
    rows = [
        ["vicreg", start, seed, "embedding", "knn", modes, 10 * modes, 0.1 * modes + 0.01 * seed + gain]
        for start, gain in (("small", 0.1), ("ordinary", 0.0)) for seed in (0, 1, 2) for modes in (0, 1, 2)
    ]  # fmt: skip
    rows.append(["vicreg", "small", 0, "embedding", "knn", 2, 99, 0.9])  # at the end of training, after the others
    means = middle_scale._means(rows)
    assert [row["modes"] for row in means] == [0, 1, 2] * 2 and means[2]["mean"] == pytest.approx(0.31)
    half = 4.303 * 0.01 / 3**0.5  # Student's t with two degrees of freedom
    assert means[0]["interval"] == pytest.approx([0.11 - half, 0.11 + half], abs=1e-5)
    (difference,) = middle_scale._differences(rows)
    assert difference["mean"] == pytest.approx((0.7 + 0.1 + 0.1) / 3) and difference["seeds"] == 3
