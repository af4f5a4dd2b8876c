"""Command line of the figures: list, help, invalid options, errors and bugs."""

import json

import pytest
from matplotlib.figure import Figure

from reproduce import train
from reproduce.__main__ import main
from reproduce.claims import Claim
from reproduce.figure import Outcome, PaperFigure
from reproduce.figures import FIGURES
from stepwise_lightning.errors import UserError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fig1"], "unknown figure 'fig1'; choose from: all, linear_model, "),
        (["three_losses", "fig1"], "unknown figure 'fig1'; choose from: all, linear_model, "),
        (["--profile", "smoke"], "'--profile' comes before the name of a figure; choose from: all, "),
        (["--resume", "three_losses"], "'--resume' comes before the name of a figure; choose from: all, "),
    ],
)
def test_unknown_figures_are_rejected(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and all(name in error for name in FIGURES)


@pytest.mark.parametrize("arguments", [[], ["list"], ["-h"], ["--help"]])
def test_list_and_help_name_every_figure(arguments, capsys):
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: ") and all(f"  {name} " in printed for name in FIGURES)


@pytest.mark.parametrize("name", ["all", "linear_model", "three_losses"])
def test_help_names_every_option(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    printed = capsys.readouterr().out
    options = ("profile {smoke,cpu,full}", "data", "out", "seeds", "resume", "root", "download", "launcher")
    assert all(f"--{option}" in printed for option in options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["linear_model", "--profile", "huge"], "argument --profile: invalid choice: 'huge'"),
        (["all", "--profile", "huge"], "argument --profile: invalid choice: 'huge'"),
        (["three_losses", "--seeds", "x"], "argument --seeds: invalid int value: 'x'"),
    ],
)
def test_invalid_options_are_reported_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_missing_data_folder_is_rejected_before_anything_is_written(tmp_path, capsys):
    assert main(["three_losses", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 2
    assert "neither one of photos, cifar10, stl10 nor the path" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class Bug(RuntimeError):
    """An unexpected exception."""


def replace_figures(monkeypatch, **errors):
    """Replace all figures by empty ones that raise the given errors, or succeed for None."""

    def figure(name, error):
        def produce(options, directory):
            if error:
                raise error
            return Outcome(Figure(), ["x"], [[1]], [Claim("one", "a number", 0, "<=", 1)], [{"run": 1}])

        return PaperFigure(name, "A plot.", "None.", {"cpu": {}}, produce)

    for name in list(FIGURES):
        monkeypatch.delitem(FIGURES, name)
    for name, error in errors.items():
        monkeypatch.setitem(FIGURES, name, figure(name, error))


def test_user_errors_are_one_line_and_bugs_are_raised(tmp_path, monkeypatch, capsys):
    replace_figures(monkeypatch, refused=UserError("no such\ncolour"), full=OSError(28, "No space"), broken=Bug("oh"))
    out = ["--out", str(tmp_path)]
    assert main(["refused", *out]) == 2
    assert capsys.readouterr().err == "error: no such colour\n"
    assert main(["full", *out]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: cannot write ") and error.endswith("free some space\n") and error.count("\n") == 1
    with pytest.raises(Bug, match="oh"):
        main(["broken", *out])


def test_bug_in_one_figure_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    replace_figures(monkeypatch, broken=Bug("oh"), refused=UserError("no such colour"), whole=None)
    assert main(["all", "--out", str(tmp_path)]) == 2
    printed, error = capsys.readouterr()
    assert error.startswith("Traceback") and error.endswith("Bug: oh\nerror: no such colour\n")
    assert "\nholds  whole: one  0         <= 1   1         -\n" in printed  # table of all claims
    assert json.loads((tmp_path / "whole" / "claims.json").read_text(encoding="utf-8"))["all_hold"]
    assert "id='whole'" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("error", [UserError("no such\ncolour"), Bug("oh")])
def test_train_command_reports_user_errors_and_raises_bugs(error, tmp_path, monkeypatch, capsys):
    def trained_runs(*arguments):
        raise error

    monkeypatch.setattr(train, "trained_runs", trained_runs)
    arguments = ["vicreg", "small", "--out", str(tmp_path)]
    if isinstance(error, Bug):
        with pytest.raises(Bug, match="oh"):
            train.main(arguments)
    else:
        assert train.main(arguments) == 2
        assert capsys.readouterr().err == "error: no such colour\n"
