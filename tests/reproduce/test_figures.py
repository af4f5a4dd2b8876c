"""The figure scripts, for real, at their smallest size."""

import csv
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from reproduce import kernel_pca, linear_model
from reproduce.__main__ import FIGURES, main
from reproduce.common import Claim
from reproduce.kernel_mlp import into_their_span
from reproduce.reference import differences
from stepwise_lightning import BarlowTwins, FixedCropPairs
from stepwise_lightning.encoders import MLP
from stepwise_lightning.spectrum.measures import detect_steps
from stepwise_lightning.theory import EmpiricalNTK, feature_cross_correlation

ROOT = Path(__file__).parent.parent
TINY = ["--profile", "smoke", "--seeds", "0", "--crop-size", "6", "--dim", "2"]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    assert main(["linear_model", "--profile", "smoke", "--seeds", "0", "1", "--out", str(out)]) == 0
    return out / "linear_model"


def test_linear_model_claims_hold_and_carry_their_evidence(outputs):
    document = json.loads((outputs / "claims.json").read_text(encoding="utf-8"))
    assert document["all_hold"]
    names = {"learned", "distinct", "error", "deviation", "excess_loss", "control"}
    assert {claim["name"] for claim in document["claims"]} == names
    assert {"settings", "seeds", "options", "versions", "commit", "data_set", "machine", "runs"} <= set(document)
    assert document["options"]["relative_rate"] <= 0.1
    assert [row["seed"] for row in document["runs"]] == [0] * 4 + [1] * 4
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


def test_theory_and_experiment_lie_under_one_tag_in_tensorboard(outputs):
    runs = [outputs / "tensorboard" / name / "version_0" for name in ("small_init_seed0", "small_init_seed0_theory")]
    measured, predicted = (
        EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload().Scalars("spectrum/cross_correlation/eig_000")
        for run in runs
    )
    assert [s.step for s in measured] == [s.step for s in predicted]
    assert max(abs(a.value - b.value) for a, b in zip(measured, predicted, strict=True)) <= 0.05


def test_a_failing_claim_is_exit_status_1(tmp_path, capsys):
    pairs = FixedCropPairs(num_pairs=64, crop_size=6)
    pairs.setup()
    limit = 1 / (4 * torch.linalg.eigvalsh(feature_cross_correlation(pairs.x1, pairs.x2))[-1])
    # Just below the limit of stability the first mode rises in a few steps and no closed form follows it.
    assert linear_model.main([*TINY, "--learning-rate", f"{0.9 * limit:.6g}", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "FAILS" in printed and "claims FAIL" in printed
    assert not json.loads((tmp_path / "linear_model" / "claims.json").read_text(encoding="utf-8"))["all_hold"]


@pytest.mark.parametrize(("measured", "relation", "holds"), [(1, "<=", True), (2.1, "<=", False), (1, ">=", False)])
def test_claims(measured, relation, holds):
    assert Claim("name", "text", measured, relation, 2).holds is holds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "cifar11"], "'cifar11' is neither one of photos, cifar10"),
        (["--data", "{empty}"], "no images in"),
        (["--data", "{texts}"], "no images in"),
        (["--data", "cifar10", "--root", "{empty}"], "no intact CIFAR-10 under"),
        (["--crop-size", "33"], "crops of 33×33 do not fit the images of 32×32 pixels"),
        (["--crop-size", "0"], "crops of 0×0"),
        (["--num-pairs", "99999"], "99999 pairs asked for, but the data set has 2690 images"),
        (["--dim", "0"], "out_features ≥ 1"),
        (["--learning-rate", "1"], "stability limit 1/(4γ_1) ="),
        (["--init-std", "nan"], "init_std must be finite"),
        (["--init-std", "0"], "no mode is ever learned"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_status_2_and_nothing_written_over(arguments, message, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no image")
    earlier = tmp_path / "out" / "linear_model" / "claims.json"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("earlier")
    arguments = [a.format(empty=tmp_path / "empty", texts=tmp_path / "texts") for a in arguments]
    assert linear_model.main(["--profile", "smoke", "--seeds", "0", "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert earlier.read_text() == "earlier" and list(earlier.parent.iterdir()) == [earlier]


def test_front_door(capsys):
    assert main([]) == 0 and "linear_model" in capsys.readouterr().out
    assert main(["fig1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: unknown figure 'fig1'; choose from: ") and error.count("\n") == 1
    assert all(name in error for name in ("linear_model", "three_losses", "kernel_mlp", "kernel_pca"))


def test_as_a_script_from_anywhere(tmp_path):
    script = ROOT / "reproduce" / "linear_model.py"
    done = subprocess.run(
        [sys.executable, str(script), "--data", "nowhere"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2 and "nowhere" in done.stderr and not list(tmp_path.iterdir())


def test_three_losses_refuses_what_is_not_there(tmp_path, capsys):
    assert main(["three_losses", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 2
    assert "neither one of photos, cifar10, stl10 nor the path" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_kernel_pca_claims_hold(tmp_path):
    assert main(["kernel_pca", "--profile", "smoke", "--seeds", "0", "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "kernel_pca" / "claims.json").read_text(encoding="utf-8"))
    assert {claim["name"] for claim in document["claims"]} == {
        f"{kernel}_{what}" for kernel in ("rbf", "relu") for what in ("training", "held_out", "step_times")
    }
    assert differences(document) == []
    document["claims"][0]["measured"] -= 0.002
    assert len(differences(document)) == 1 and "kernel_pca, rbf_training: 0.998" in differences(document)[0]
    document["seeds"] = [1]
    assert differences(document) == ["kernel_pca: seeds are [1], but the reference has [0]"]
    with (tmp_path / "kernel_pca" / "data.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["quantity"] == "eigenvalue" and row["kernel"] == "RBF"]
    assert all(abs(float(row["experiment"]) - float(row["theory"])) < 1e-3 for row in rows[-2:])
    with Image.open(tmp_path / "kernel_pca" / "figure.png") as figure:
        assert figure.size[0] > 1000


def test_the_last_mode_of_a_kernel_machine_is_on_time():
    """It starts at 1e-20, and grows beside learned modes in which float64 would lose it, in most bases."""
    options = Namespace(num_pairs=60, held_out=40, crop_size=8, dim=5, data="photos", root=None)
    assert kernel_pca.experiment("RBF", 0, options).summary()["largest_step_time_error"] < 3e-3


@pytest.mark.slow
def test_kernel_mlp_claims_hold(tmp_path):
    assert main(["kernel_mlp", "--profile", "smoke", "--seeds", "0", "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "kernel_mlp" / "claims.json").read_text(encoding="utf-8"))
    assert [run["variant"] for run in document["runs"]] == ["lazy", "rich"]
    # The tangent kernel at initialisation says less of the rich run, whose kernel changes.
    assert document["runs"][1]["largest_step_time_error"] > document["runs"][0]["largest_step_time_error"]


def test_training_in_the_span_of_the_inputs_is_training():
    """The same outputs at the start and after gradient descent, with and without the change of basis."""
    pairs = FixedCropPairs(num_pairs=10, crop_size=6, seed=3)
    pairs.setup()
    plain, reduced = (MLP(108, [32], 3, seed=1) for _ in range(2))
    inputs = [pairs.x1, pairs.x2], list(into_their_span(reduced, pairs.x1, pairs.x2))
    assert inputs[1][0].shape == (10, 20) and sum(p.numel() for p in reduced.parameters()) < 1000
    for encoder, views in zip((plain, reduced), inputs, strict=True):
        module = BarlowTwins(encoder, 0.002, off_diagonal_weight=1.0, normalize=False)
        optimiser = torch.optim.SGD(encoder.parameters(), lr=0.002)
        for _ in range(50):
            optimiser.zero_grad()
            module.loss(encoder(views[0]), encoder(views[1])).backward()
            optimiser.step()
    with torch.no_grad():
        expected, found = plain(inputs[0][0]), reduced(inputs[1][0])
        assert not torch.allclose(expected, MLP(108, [32], 3, seed=1)(inputs[0][0]), atol=0.1)  # it learned
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    kernels = [
        EmpiricalNTK(encoder)(views[0], views[1]) for encoder, views in zip((plain, reduced), inputs, strict=True)
    ]
    torch.testing.assert_close(kernels[0], kernels[1], rtol=1e-3, atol=1e-3)


def test_resume_keeps_a_finished_figure_and_only_that(tmp_path, capsys):
    arguments = ["linear_model", *TINY, "--out", str(tmp_path), "--resume"]
    status, path = main(arguments), tmp_path / "linear_model" / "claims.json"
    text, written = path.read_text(encoding="utf-8"), path.stat().st_mtime_ns
    assert main(arguments) == status
    assert "kept" in capsys.readouterr().out and path.stat().st_mtime_ns == written
    digest = json.loads(text)["source_sha256"]
    for changed, said in (
        (text.replace(digest, 64 * "0"), ""),
        (text[:100], "cannot be read; the figure is made again"),
    ):
        path.write_text(changed, encoding="utf-8")
        assert main(arguments) == status
        printed = capsys.readouterr()
        assert "kept" not in printed.out and said in printed.err
        again = json.loads(path.read_text(encoding="utf-8"))
        assert again["claims"] == json.loads(text)["claims"] and again["source_sha256"] == digest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["linear_model", "--profile", "huge"], "argument --profile: invalid choice: 'huge'"),
        (["all", "--profile", "huge"], "argument --profile: invalid choice: 'huge'"),
        (["three_losses", "--seeds", "x"], "argument --seeds: invalid int value: 'x'"),
    ],
)
def test_bad_options_are_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_an_output_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    assert main(["kernel_pca", "--profile", "smoke", "--out", str(tmp_path / "out")]) == 2
    assert "choose another folder with --out" in capsys.readouterr().err


@pytest.mark.slow
def test_all_figures_and_the_report(tmp_path, capsys):
    """Every script runs, from shared runs, and finds the numbers that it is to find."""
    arguments = ["all", "--profile", "smoke", "--seeds", "0", "--out", str(tmp_path)]
    assert main(arguments) == 0
    assert "error" not in capsys.readouterr().err
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for name in FIGURES:
        document = json.loads((tmp_path / name / "claims.json").read_text(encoding="utf-8"))
        assert document["claims"] and f"id='{name}'" in page and differences(document) == []
        assert all((tmp_path / name / file).stat().st_size > 1000 for file in ("figure.png", "figure.pdf", "data.csv"))
    assert page.count("data:image/png;base64") == len(FIGURES) and "data:image/gif;base64" in page
    # Six runs, whatever the number of figures that they are for; each is read as SpectrumLogger wrote it.
    assert len(list((tmp_path / "runs").iterdir())) == 6
    with np.load(tmp_path / "runs/vicreg_small_seed0/version_0/spectrum.npz") as saved:
        steps = detect_steps(torch.tensor(saved["time"]), torch.tensor(saved["covariance"]))
    runs = json.loads((tmp_path / "three_losses" / "claims.json").read_text(encoding="utf-8"))["runs"]
    assert steps.num_distinct == next(run for run in runs if run["loss"] == "vicreg")["distinct_steps"]
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/claims.json")}
    (tmp_path / "hidden_spectra" / "claims.json").unlink()
    assert main(arguments) == 0  # only what is missing is made
    again = {path: path.stat().st_mtime_ns for path in kept}
    assert [path.parent.name for path in kept if kept[path] != again[path]] == ["hidden_spectra"]
