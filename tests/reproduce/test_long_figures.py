"""Long figures with the smoke profile."""

import json

import pytest

from reproduce.__main__ import main
from reproduce.figures import FIGURES, LONG


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
