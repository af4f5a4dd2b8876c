"""Long figures with the smoke profile."""

import csv
import json
from pathlib import Path

import pytest
import torch

from reproduce.__main__ import main
from reproduce.claims import read_claim
from reproduce.figures import FIGURES, LONG
from reproduce.networks.variants import LOSS_SETTINGS
from stepwise_lightning.spectrum import detect_steps

pytestmark = pytest.mark.usefixtures("rendered_figures")
STORED = Path(__file__).parents[2] / "reproduce" / "results" / "middle_scale"


def test_stored_eigenvalues_of_middle_scale_give_its_claims():
    with (STORED / "data.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["quantity"] == "eigenvalue"]

    def distinct_steps(loss, variant):
        run = [row for row in rows if (row["loss"], row["variant"]) == (loss, variant)]
        times = sorted({float(row["time"]) for row in run})
        eigenvalues = torch.tensor([float(row["value"]) for row in run], dtype=torch.float64)
        return detect_steps(torch.tensor(times), eigenvalues.view(len(times), -1)).num_distinct

    claims = [read_claim(saved) for saved in json.loads((STORED / "claims.json").read_text(encoding="utf-8"))["claims"]]
    assert [claim.name for claim in claims] == [f"{loss}_steps" for loss in LOSS_SETTINGS]
    assert all(claim.holds for claim in claims)
    assert [claim.measured for claim in claims] == [distinct_steps(loss, "small") for loss in LOSS_SETTINGS]
    assert {claim.control_value for claim in claims} == {distinct_steps("barlow_twins", "ordinary")}


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
