"""Plateaus of losses, and the command ``stepwise diagnose``."""

import math
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from stepwise_lightning import barlow_twins_loss, simclr_loss, vicreg_loss
from stepwise_lightning.__main__ import main
from stepwise_lightning.commands import diagnose
from stepwise_lightning.theory import find_plateau, plateaus

PAGE = (Path(__file__).parents[2] / "docs" / "plateaus.md").read_text(encoding="utf-8")
PUBLIC = re.findall(r"^\| \[([^]]+)\]\(https.*?\| ([\d.]+) \| `(--[^`]+)` \| ([\d.]+) \|$", PAGE, re.MULTILINE)
ANALYTICAL = {"normalize": False, "off_diagonal_weight": 1}

# Reported by runs that learn or have just started, or the saddle value of another batch size
NO_PLATEAUS = {
    "SupContrast #42 after 800 epochs": ("5.6", ("supcon", 64, None, None, 0.1)),
    "swav #120, last epoch": ("2.88", ("swav", None, None, 21)),
    "swav #62": ("4.1547", ("swav", None, None, 3000)),
    "dinov3 #199 at the start": ("8.38", ("dino", None, None, 4096)),
    "ln n of another loss": ("4.852", ("siglip", 128)),
    "other batch size": ("6.9287", ("simclr", 500)),
    "above": ("6.95", ("simclr", 512)),
    "between modes": ("7.4", partial(plateaus, "barlow_twins", dim=10, **ANALYTICAL)),
}


@pytest.mark.parametrize(
    ("reported", "options", "plateau"),
    [*(row[1:] for row in PUBLIC), ("4.85", "--loss clip --batch-size 128", "4.852")],
    ids=[*(row[0] for row in PUBLIC), "open_clip #17 with three digits"],
)
def test_public_losses_are_on_the_saddle_value(reported, options, plateau, capsys):
    diagnose.main([*options.split(), "--value", reported])
    *_, line = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{reported} is on the saddle value {plateau} of ") and "no mode is learned" in line


def test_page_has_the_public_examples():
    assert len(PUBLIC) == 9


@pytest.mark.parametrize(("value", "known"), NO_PLATEAUS.values(), ids=NO_PLATEAUS)
def test_other_values_are_on_no_plateau(value, known):
    assert find_plateau(plateaus(*known) if isinstance(known, tuple) else known(), value) is None


def test_formulas_equal_the_losses_of_equal_embeddings():
    n, num_prototypes, temperature = 12, 30, 0.1
    z = F.normalize(torch.ones(2 * n, 5, dtype=torch.float64), dim=1)
    labels = torch.arange(n) % 3
    masked = (z @ z.T / temperature).masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf)
    same = (labels.repeat(2)[:, None] == labels.repeat(2)) & ~torch.eye(2 * n, dtype=torch.bool)
    supcon = -temperature / 0.07 * masked.log_softmax(1)[same].mean()
    clip = F.cross_entropy(z[:n] @ z[n:].T / temperature, torch.arange(n))
    uniform = torch.full((n, num_prototypes), 1 / num_prototypes, dtype=torch.float64)
    swav = F.cross_entropy(z[:n] @ torch.ones(5, num_prototypes, dtype=torch.float64), uniform)
    signs = 2 * torch.eye(n, dtype=torch.float64) - 1

    def siglip(bias):
        return -F.logsigmoid(signs * (10 * z[:n] @ z[n:].T + bias)).sum() / n

    learned = min(siglip(bias - math.log(n - 1)) for bias in (-9.99, -10, -10.01))
    simclr = simclr_loss(z[:n], z[n:])
    expected = {
        "simclr": [simclr],
        "supcon": [supcon],
        "clip": [clip],
        "siglip": [siglip(-10), learned],
        "swav": [swav],
        "dino": [swav],
    }
    for name, values in expected.items():
        known = plateaus(name, n, num_prototypes=num_prototypes if name in ("swav", "dino") else None, temperature=0.1)
        assert [plateau.value for plateau in known] == pytest.approx([float(value) for value in values], rel=1e-6), name


def test_analytical_barlow_twins_has_a_plateau_for_each_mode():
    known = plateaus("barlow_twins", dim=4, **ANALYTICAL)
    for k in range(5):
        z = torch.eye(4, dtype=torch.float64)[:, :4] * 2 * (torch.arange(4) < k)  # C is a projector of rank k
        assert known[k].value == barlow_twins_loss(z, z, **ANALYTICAL) == 4 - k
        assert find_plateau(known, str(4 - k + 0.05)).num_learned == k
    assert [each.value for each in plateaus("barlow_twins", dim=4)] == pytest.approx([4])


def test_digits_of_the_value_set_the_tolerance():
    known = plateaus("clip", 128)  # 4.852
    assert all(find_plateau(known, value) for value in ("4.8", "4.9", "4.85", 4.852, 4.8541))
    assert not any(find_plateau(known, value) for value in ("4.80", "4.87", "9", 4.8, 4.803, 4.856))
    assert find_plateau(plateaus("clip", 128, scale=2.0), "9.704").value == pytest.approx(2 * math.log(128))
    assert find_plateau(plateaus("clip", 128, scale=100.0), "485.40")  # 485.20
    zero = plateaus("spectral_contrastive")
    assert all(find_plateau(zero, value) for value in ("0", "0.0", "0.00012", "-0.0004", "0.01", 2e-5))
    assert not any(find_plateau(zero, value) for value in ("-0.5", "0.0020", 0.01))


def test_saddle_values_need_no_large_matrices():
    assert [plateau.value for plateau in plateaus("barlow_twins", dim=1_000_000)] == [1e6]
    assert plateaus("vicreg", dim=1_000_000) == plateaus("vicreg")
    (plateau,) = plateaus(lambda z1, z2: -(z1 * z2).sum() / z1.norm() / z2.norm(), 2, dim=1_000_000)  # not finite at 0
    assert plateau.value == pytest.approx(-1)


MY_LOSSES = """
import torch


def cosine(z1, z2):  # not finite at 0
    return -((z1 * z2).sum(1) / z1.norm(dim=1) / z2.norm(dim=1)).mean()


class Terms(torch.nn.Module):
    def forward(self, z1, z2):
        return {"mean": (z1 - z2).square().mean(), "constant": 1.5 + 0 * z1.sum()}


def failing(z1, z2):
    return z1 @ z2
"""


@pytest.fixture
def my_losses(tmp_path, monkeypatch):
    (tmp_path / "plateau_losses.py").write_text(MY_LOSSES)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("plateau_losses", None)


@pytest.mark.parametrize(("loss", "value"), [("cosine", "-1.00"), ("Terms", "1.50")])
def test_loss_by_dotted_path(my_losses, loss, value, capsys):
    diagnose.main(["--loss", f"plateau_losses.{loss}", "--batch-size=8", "--dim=3", "--value", value])
    assert f"on the saddle value {float(value):.3f}" in capsys.readouterr().out


def test_plateaus_without_a_value_are_printed(capsys):
    diagnose.main(["--loss=barlow_twins", "--dim=128", "--settings", "normalize=false", "off_diagonal_weight=1"])
    first, *_, dots, last = capsys.readouterr().out.splitlines()
    assert first.split(maxsplit=1) == ["128", "no mode is learned"] and dots == "…" and last.startswith("0 ")
    diagnose.main(["--loss=vicreg", "--settings", "eps=1e-4"])
    zero = torch.zeros(2, 2, dtype=torch.float64)
    assert float(capsys.readouterr().out.split()[0]) == pytest.approx(float(vicreg_loss(zero, zero)))


MISTAKES = {
    "name": ("--loss=SimCLR --batch-size=8", "loss must be one of barlow_twins, "),
    "no batch": ("--loss=simclr --value=6.9", "depend on num_pairs: give num_pairs (option --batch-size)"),
    "no prototypes": ("--loss=dino --batch-size=64", "num_prototypes: give num_prototypes (option --prototypes)"),
    "batch": ("--loss=clip --batch-size=1", "at least 2 and at most 1000000, got 1: give that of the run"),
    "dim": ("--loss=barlow_twins --dim=10000000", "at most 1000000, got 10000000"),
    "digits": ("--loss=clip --batch-size=64 --value=4", "4 has too few digits to compare it with 4.159"),
    "near plateaus": ("--loss=barlow_twins --dim=128 --scale=0.025 --value=3.2 --settings normalize=false "
                      "off_diagonal_weight=1", "3.2 has too few digits to compare it with 3.2 and 3.175"),
    "value": ("--loss=clip --batch-size=64 --value=nan", "nan, so training has diverged: lower the learning rate"),
    "text": ("--loss=clip --batch-size=64 --value=high", "must be a number, got high"),
    "scale": ("--loss=clip --batch-size=64 --scale=0", "scale (option --scale) must be positive and finite, got 0"),
    "not a number": ("--loss=vicreg --settings eps=[1", "with a number, true or false, got eps=[1"),
    "negative": ("--loss=vicreg --settings eps=-1", "eps of vicreg must be a number, at least 0 and finite, got -1"),
    "not true or false": ("--loss=barlow_twins --dim=4 --settings normalize=2", "must be true or false, got 2.0"),
    "setting": ("--loss=vicreg --settings weight=2", "vicreg has no setting weight"),
    "not a setting": ("--loss=vicreg --settings scale=2", "must be NAME=VALUE, without loss, "),
    "temperature": ("--loss=vicreg --temperature=0.1", "vicreg has no setting temperature"),
    "path": ("--loss=no_module.loss --batch-size=8 --dim=2", "loss no_module.loss cannot be imported"),
    "function": ("--loss=plateau_losses.failing --batch-size=8 --dim=2", "the loss fails for float64 embeddings"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_is_reported_in_one_line(my_losses, arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["stepwise", "diagnose", *arguments.split()])
    with pytest.raises(SystemExit) as stop:
        main()
    text = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    (line,) = text.strip().splitlines()
    assert line.startswith("stepwise") and message in line
