"""What is said in one line and what keeps its traceback: the class of an error decides, not where it was raised."""

import errno
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import changed, refusal, stepwise, write_images

from stepwise_lightning import losses
from stepwise_lightning.errors import CannotWriteError, DivergedError, NotFoundError, UserError, one_line


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    write_images(tmp_path)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "kind",
    [ValueError, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (OSError, ArithmeticError, RuntimeError))],
)
def test_a_bug_inside_a_loss_keeps_its_traceback(kind, monkeypatch):
    def broken(*_):
        raise kind("a slip of ours")

    monkeypatch.setattr(losses, "barlow_twins_terms", broken)
    with pytest.raises(kind, match="a slip of ours"):
        stepwise("fit")


@pytest.mark.parametrize("kind", [ValueError, OSError, ArithmeticError, RuntimeError, KeyError])
def test_general_exceptions_have_no_line(kind):
    with pytest.raises(kind) as raised:
        raise kind("a slip of ours")
    assert one_line(raised.value) is None


def test_what_the_loss_says_on_purpose_is_one_line(capsys, monkeypatch):
    def refuse(*_):
        raise UserError("z1 and z2 must have one shape:\n  make it so")

    monkeypatch.setattr(losses, "barlow_twins_terms", refuse)
    assert refusal(capsys, "fit") == "stepwise: error: z1 and z2 must have one shape: make it so"


def test_a_class_of_ones_own_may_use_it_too(capsys, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "polite.py").write_text(
        "import torch\nfrom stepwise_lightning.errors import UserError\n\n"
        "class Encoder(torch.nn.Linear):\n    def forward(self, x):\n        raise UserError('give me flat inputs')\n"
    )
    encoder = {"class_path": "polite.Encoder", "init_args": {"in_features": 48, "out_features": 3}}
    line = refusal(capsys, "fit", config=changed({"model.init_args.encoder": encoder}))
    assert line == "stepwise: error: give me flat inputs"
    sys.modules.pop("polite")


def test_users_of_the_library_catch_what_they_expect():
    for error, expected in (
        (NotFoundError, FileNotFoundError),
        (CannotWriteError, OSError),
        (DivergedError, ArithmeticError),
    ):
        assert issubclass(error, (ValueError,)) and issubclass(error, expected)
        assert one_line(error("as it says")) == "as it says"
    with pytest.raises(ValueError, match="must have one shape"):
        losses.vicreg_loss(torch.ones(3, 2), torch.ones(4, 2))


def test_a_file_that_is_not_there_in_one_s_own_code_keeps_its_traceback(monkeypatch):
    """Only what Lightning or a logger wanted to write is said in one line."""

    def broken(*_):
        (Path("mine.yaml") / "no folder").mkdir()

    monkeypatch.setattr(losses, "barlow_twins_terms", broken)
    with pytest.raises(NotADirectoryError):
        stepwise("fit")


def test_a_full_disk_speaks_first():
    inner = OSError(errno.ENOSPC, "No space left on device", "runs/spectrum.csv")
    try:
        try:
            raise inner
        except OSError as error:
            raise RuntimeError("whatever a library makes of it") from error
    except RuntimeError as error:
        assert one_line(error) == (
            "cannot write runs/spectrum.csv: No space left on device; what was saved before is kept; free some space"
        )
