"""Errors reported in one line and errors that keep their traceback."""

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
def test_bug_in_a_loss_keeps_its_traceback(kind, monkeypatch):
    def broken(*_):
        raise kind("a bug")

    monkeypatch.setattr(losses, "barlow_twins_terms", broken)
    with pytest.raises(kind, match="a bug"):
        stepwise("fit")


@pytest.mark.parametrize("kind", [ValueError, OSError, ArithmeticError, RuntimeError, KeyError])
def test_general_exceptions_are_not_reported_in_one_line(kind):
    with pytest.raises(kind) as raised:
        raise kind("a bug")
    assert one_line(raised.value) is None


def test_user_error_of_a_loss_is_one_line(capsys, monkeypatch):
    def refuse(*_):
        raise UserError("z1 and z2 must have one shape:\n  make it so")

    monkeypatch.setattr(losses, "barlow_twins_terms", refuse)
    assert refusal(capsys, "fit") == "stepwise: error: z1 and z2 must have one shape: make it so"


def test_user_error_of_a_user_class_is_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_encoder.py").write_text(
        "import torch\nfrom stepwise_lightning.errors import UserError\n\n"
        "class Encoder(torch.nn.Linear):\n    def forward(self, x):\n        raise UserError('inputs must be flat')\n"
    )
    encoder = {"class_path": "own_encoder.Encoder", "init_args": {"in_features": 48, "out_features": 3}}
    line = refusal(capsys, "fit", config=changed({"model.init_args.encoder": encoder}))
    assert line == "stepwise: error: inputs must be flat"
    sys.modules.pop("own_encoder")


def test_user_errors_are_instances_of_builtin_exceptions():
    for error, expected in (
        (NotFoundError, FileNotFoundError),
        (CannotWriteError, OSError),
        (DivergedError, ArithmeticError),
    ):
        assert issubclass(error, (ValueError,)) and issubclass(error, expected)
        assert one_line(error("the message")) == "the message"
    with pytest.raises(ValueError, match="must have one shape"):
        losses.vicreg_loss(torch.ones(3, 2), torch.ones(4, 2))


def test_os_error_in_user_code_keeps_its_traceback(monkeypatch):

    def broken(*_):
        (Path("mine.yaml") / "no folder").mkdir()

    monkeypatch.setattr(losses, "barlow_twins_terms", broken)
    with pytest.raises(NotADirectoryError):
        stepwise("fit")


def test_full_disk_is_reported_first():
    inner = OSError(errno.ENOSPC, "No space left on device", "runs/spectrum.csv")
    try:
        try:
            raise inner
        except OSError as error:
            raise RuntimeError("an error of a library") from error
    except RuntimeError as error:
        assert one_line(error) == (
            "cannot write runs/spectrum.csv: No space left on device; what was saved before is kept; free some space"
        )
