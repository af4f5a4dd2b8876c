"""Outputs of a figure: --resume, damaged files, checksums, and claims."""

import json
import math
import os
from dataclasses import asdict
from statistics import geometric_mean

import pytest
from matplotlib.figure import Figure

from reproduce.__main__ import main
from reproduce.claims import Claim, average, claims_table, read_claim, worst
from reproduce.figure import FILES, Outcome, PaperFigure, run_figure

COMPUTED_AGAIN = "computing the figure again"


def figure(out, *arguments, measured=1.0):
    """Run a trivial figure; return the exit status."""

    def produce(options, directory):
        drawing = Figure()
        drawing.subplots().plot([0, 1])
        claims = [Claim("one", "a number", measured, "<=", 1.0)]
        return Outcome(drawing, ["x", "y"], [[1, 2], [3, 4]], claims, [{"run": 1}])

    profiles = {"cpu": {}, "full": {"data": "stl10"}}
    plot = PaperFigure("plot", "A plot.", "None.", profiles, produce)
    return run_figure(plot, ["--out", str(out), *arguments])


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("figure.png", "gone"), ("figure.pdf", "half"), ("data.csv", "other text"), ("claims.json", "half"),
        ("claims.json", "empty"), ("claims.json", "gone"),
    ],
)  # fmt: skip
def test_damaged_output_is_reported_and_computed_again(file, damage, tmp_path, capsys):
    assert figure(tmp_path) == 0
    path = tmp_path / "plot" / file
    whole = path.read_bytes()
    path.write_bytes({"half": whole[: len(whole) // 2], "other text": whole + b"x"}.get(damage, b""))
    if damage == "gone":
        path.unlink()
    assert figure(tmp_path, "--resume") == 0
    printed = capsys.readouterr()
    if (file, damage) == ("claims.json", "gone"):
        assert printed.err == ""
    else:
        assert printed.err.startswith("warning: ") and str(path) in printed.err and printed.err.count("\n") == 1
        assert printed.err.endswith(f"{COMPUTED_AGAIN}\n")
    assert "kept" not in printed.out and {entry.name for entry in path.parent.iterdir()} == {*FILES, "claims.json"}
    assert figure(tmp_path, "--resume") == 0
    printed = capsys.readouterr()
    assert "kept from an earlier run" in printed.out and printed.err == ""


def test_resume_depends_on_settings_and_not_on_paths(tmp_path, monkeypatch, capsys):
    assert figure(tmp_path) == 0
    monkeypatch.chdir(tmp_path)
    places = ["--out", ".", "--root", "elsewhere", "--launcher", "srun"]
    for arguments, kept in (
        (places, True), (["--seeds", "3"], False), (["--data", "cifar10"], False), (["--profile", "full"], False)
    ):  # fmt: skip
        capsys.readouterr()
        assert figure(tmp_path, "--resume", *arguments) == 0
        assert ("kept from" in capsys.readouterr().out) is kept
        assert figure(tmp_path) == 0
    assert figure(tmp_path, "--resume", measured=2.0) == 0  # no new measurement


def test_failing_claim_gives_exit_status_1(tmp_path, capsys):
    assert figure(tmp_path, measured=2.0) == 1
    printed = capsys.readouterr().out
    assert "FAILS  a number: 2 (<= 1)" in printed and "VERDICT: 1 of 1 claims FAIL" in printed
    assert not json.loads((tmp_path / "plot" / "claims.json").read_text(encoding="utf-8"))["all_hold"]


@pytest.mark.parametrize("name", ["kernel_pca", "linear_model", "three_losses", "all"])
@pytest.mark.parametrize("obstacle", ["a file", "no permission"])
def test_unwritable_output_folder_is_reported_in_one_line(name, obstacle, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    if obstacle == "a file":
        out.write_text("a file")
    else:  # root can write everywhere
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert main([name, "--profile", "smoke", "--out", str(out / "deeper")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: cannot write to ") and "choose another folder with --out" in error
    assert error.count("\n") == 1


def test_claims_contain_the_checksums_of_the_other_files(tmp_path):
    assert figure(tmp_path) == 0
    document = json.loads((tmp_path / "plot" / "claims.json").read_text(encoding="utf-8"))
    assert set(document["sha256"]) == set(FILES) and all(len(value) == 64 for value in document["sha256"].values())


@pytest.mark.parametrize(("measured", "relation", "holds"), [(1, "<=", True), (2.1, "<=", False), (1, ">=", False)])
def test_claim_compares_the_measured_number_with_its_bound(measured, relation, holds):
    assert Claim("name", "text", measured, relation, 2).holds is holds


@pytest.mark.parametrize(
    ("relation", "control", "holds"),
    [("<=", 2.1, True), ("<=", 2.0, False), (">=", 1.9, True), (">=", 2.0, False), ("<=", math.nan, False)],
)
def test_claim_fails_if_its_control_satisfies_the_bound(relation, control, holds):
    claim = Claim("name", "text", 2.0, relation, 2.0, "wrong pairs", control)
    assert claim.holds is holds and claim.distance == 0
    assert f"(<= 2; wrong pairs: {control:.4g})".replace("<=", relation) in str(claim)


@pytest.mark.parametrize(("relation", "measured", "control"), [("<=", 0.2, 0.7), (">=", 0.1, 0.9)])
def test_worst_takes_the_worst_seed_and_the_best_control(relation, measured, control):
    claim = worst("name", "text", [0.1, 0.2], relation, 0.5, [0, 1], "wrong pairs", [0.9, 0.7])
    assert (claim.measured, claim.control_value) == (measured, control)
    assert (claim.values, claim.control_values) == ([0.1, 0.2], [0.9, 0.7])
    assert worst("name", "text", [0.1, 0.2], relation, 0.5, [0]).values == []  # two numbers of one seed
    assert worst("name", "text", [0.1, 0.2], relation, 0.5, [0, 1]).control_value is None


def test_average_lists_its_values_and_averages_the_control():
    claim = average("name", "text", [0.5, 2.0], "<=", 1.1, [3, 4], "wrong pairs", [1.0, 4.0], geometric_mean)
    assert claim.measured == pytest.approx(1.0) and claim.control_value == pytest.approx(2.0) and claim.holds
    assert claim.description == "text, mean over seeds 3, 4 (0.5, 2)"
    assert (claim.values, claim.control_values) == ([0.5, 2.0], [1.0, 4.0])
    assert not average("name", "text", [0.5, 2.0], "<=", 1.1, [3, 4], "wrong pairs", [1.0, 4.0]).holds  # 1.25
    assert not average("name", "text", [1.0, float("nan")], "<=", 1.1, [3, 4]).holds
    single = average("name", "text", [0.5], "<=", 1.1, [3])
    assert single.control_value is None and single.description == "text, mean over seed 3"


def test_saved_claims_without_controls_are_read():
    saved = {"name": "n", "description": "d", "measured": 1.5, "relation": "<=", "bound": 2}
    assert read_claim(saved) == Claim("n", "d", 1.5, "<=", 2.0)
    claim = Claim("n", "d", 1.5, "<=", 2.0, "wrong pairs", 3.0, [1.0, 2.0], [3.0, 3.0])
    assert read_claim(json.loads(json.dumps(asdict(claim)))) == claim


def test_claims_table_shows_distances_and_controls():
    claims = [("one", Claim("a", "text", 1.5, "<=", 2.0, "wrong pairs", 3.0)), ("two", Claim("b", "text", 1, ">=", 2))]
    lines = [line.split() for line in claims_table(claims).splitlines()]
    assert lines[1:] == [
        ["holds", "one:", "a", "1.5", "<=", "2", "0.5", "wrong", "pairs", "3"],
        ["FAILS", "two:", "b", "1", ">=", "2", "-1", "-"],
    ]
