"""Figure linear_model: claims, files and invalid input."""

import csv
import json

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from reproduce.__main__ import main


@pytest.fixture(scope="module")
def outputs(tmp_path_factory, rendered_figures):
    """Run the figure with two of the smoke profile's four dimensions, which need a twelfth of the steps."""
    out = tmp_path_factory.mktemp("results")
    assert main(["linear_model", "--profile", "smoke", "--dim", "2", "--seeds", "0", "--out", str(out)]) == 0
    return out / "linear_model"


def test_linear_model_claims_hold_and_are_documented(outputs):
    document = json.loads((outputs / "claims.json").read_text(encoding="utf-8"))
    assert document["all_hold"]
    names = {"distinct", "crossed", "detected", "deviation", "log_deviation", "objective", "loss"}
    names |= {"aligned", "recursion", "norm"}
    assert {claim["name"] for claim in document["claims"]} == names
    assert all(claim["control"] and claim["control_value"] is not None for claim in document["claims"])
    assert {"settings", "seeds", "options", "versions", "commit", "data_set", "machine", "runs"} <= set(document)
    assert document["options"]["relative_rate"] <= 0.1
    assert [row["seed"] for row in document["runs"]] == [0] * 2
    for mode in document["runs"]:
        assert mode["measured_step_time"] == pytest.approx(mode["predicted_step_time"], rel=0.02)


def test_linear_model_files(outputs):
    with Image.open(outputs / "figure.png") as figure:
        assert figure.size[0] > 1000
    assert (outputs / "figure.pdf").read_bytes().startswith(b"%PDF")
    with (outputs / "data.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["run"] == "small_init" and row["quantity"] == "eigenvalue"]
    assert max(abs(float(row["experiment"]) - float(row["theory"])) for row in rows) <= 0.05
    assert not list(outputs.glob("*.partial*"))


def test_theory_and_experiment_share_a_tensorboard_tag(outputs):
    runs = [outputs / "tensorboard" / name / "version_0" for name in ("small_init_seed0", "small_init_seed0_theory")]
    measured, predicted = (
        EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload().Scalars("C/eig_000") for run in runs
    )
    assert [s.step for s in measured] == [s.step for s in predicted]
    assert max(abs(a.value - b.value) for a, b in zip(measured, predicted, strict=True)) <= 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "cifar11"], "'cifar11' is neither one of photos, cifar10"),
        (["--data", "{empty}"], "no images in"),
        (["--data", "{texts}"], "no images in"),
        (["--data", "cifar10", "--root", "{empty}"], "no intact CIFAR-10 under"),
        (["--crop-size", "33"], "crop_size 33 does not fit images of 32×32 pixels"),
        (["--crop-size", "0"], "crop_size 0 does not fit"),
        (["--num-pairs", "99999"], "num_pairs 99999 does not fit a data set of 2690 images"),
        (["--dim", "0"], "out_features ≥ 1"),
        (["--learning-rate", "1"], "stability limit 1/(4γ_1) ="),
        (["--init-std", "nan"], "init_std must be finite"),
        (["--init-std", "0"], "no mode rises"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_invalid_input_is_reported_in_one_line_without_overwriting(arguments, message, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no image")
    earlier = tmp_path / "out" / "linear_model" / "claims.json"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("earlier")
    arguments = [a.format(empty=tmp_path / "empty", texts=tmp_path / "texts") for a in arguments]
    assert main(["linear_model", "--profile", "smoke", "--seeds", "0", "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert earlier.read_text() == "earlier" and list(earlier.parent.iterdir()) == [earlier]
