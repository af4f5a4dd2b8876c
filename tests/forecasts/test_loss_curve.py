"""``diagnose`` of training losses alone."""

import math

import pytest
import torch

from stepwise_lightning import SpectrumRecord, diagnose
from stepwise_lightning.forecasts.diagnosis import CAUSES

ANALYTICAL = {"off_diagonal_weight": 1.0, "normalize": False, "dim": 5}
FLAT, FALLING = torch.full((50,), 6.9304), torch.linspace(6.93, 3, 50)
NAN, INF = torch.tensor([math.nan]), torch.tensor([math.inf])
CURVES = {
    "on the saddle value": (FLAT, "plateau", 6),
    "learning": (FALLING, "learning", 0),
    "fallen back": (torch.cat([FALLING, FLAT]), "fell_back", 2),
    "diverged": (torch.cat([FLAT, torch.tensor([1e9] * 9)]), "diverged", 2),
    "not finite": (torch.cat([FLAT, NAN]), "diverged", 2),
    "not finite at the end": (torch.cat([FLAT, NAN.repeat(9)]), "diverged", 2),
    "never finite": (NAN.repeat(9), "diverged", 2),
    "one step not finite": (torch.cat([FLAT, INF, FLAT[:5], NAN, FLAT[:2]]), "plateau", 6),
    "rising": (torch.linspace(1, 5.9, 30), "diverged", 2),
    "rising above the saddle value": (torch.linspace(1, 9, 30), "diverged", 2),
    "first loss is 0": (torch.cat([torch.zeros(1), FALLING]), "learning", 0),
    "constant below": (torch.full((50,), 4.0), "plateau", 0),
    "constant above": (torch.full((50,), 7.0), "plateau", 0),
    "large": (torch.full((50,), 1e30), "plateau", 0),
}


@pytest.mark.parametrize(("losses", "verdict", "num_causes"), CURVES.values(), ids=CURVES)
def test_verdict_of_losses(losses, verdict, num_causes):
    result = diagnose(losses, loss="simclr", num_pairs=512)
    assert (result.verdict, len(result.possible_causes)) == (verdict, num_causes)
    assert set(result.possible_causes) <= set(CAUSES) and "saddle" not in str(result)
    assert ("For the cause, give" in str(result)) == (verdict != "learning")
    assert diagnose(losses).verdict in (verdict, "plateau", "learning")  # unknown loss


def test_rising_loss_is_named():
    for end, verdict in ((1.9, "plateau"), (5.9, "diverged")):
        result = diagnose(torch.linspace(1, end, 30))
        assert result.verdict == verdict and "The loss rises, from 1." in str(result)


@pytest.mark.parametrize(("end", "verdict", "num_learned"), [(3.02, "plateau", 2), (0.02, "finished", 5)])
def test_losses_of_the_analytical_loss_name_the_plateau(end, verdict, num_learned):
    losses = torch.cat([torch.linspace(5, end, 30), torch.full((60,), end)])
    result = diagnose(losses, loss="barlow_twins", settings=ANALYTICAL)
    assert (result.verdict, result.num_learned) == (verdict, num_learned)
    assert f"on the plateau {end:.0f}" in str(result)


@pytest.mark.parametrize("value", [44.361, 5.151])
def test_both_saddle_values_of_siglip_are_plateaus(value):
    result = diagnose([value] * 40, loss="siglip", settings={"num_pairs": 64})
    assert (result.verdict, result.num_learned) == ("plateau", 0) and abs(result.distance) < 1e-3
    record = SpectrumRecord.of(torch.arange(40.0), torch.full((40, 3), 1e-8), torch.full((40,), value))
    assert diagnose(record, loss="siglip", num_pairs=64).saddle_value == pytest.approx(value, rel=1e-4)
    assert diagnose([0.8 * value] * 10 + [value] * 40, loss="siglip", num_pairs=64).verdict == "fell_back"


@pytest.mark.parametrize(("value", "num_learned"), [(0.0, 0), (2e-5, 0), (0.01, None), (-0.5, None)])
def test_tolerance_of_a_saddle_value_of_zero(value, num_learned):
    assert diagnose([value] * 20, loss="spectral_contrastive").num_learned == num_learned


def test_settings_that_are_not_numbers_are_refused():
    for settings in ({"temperature": "a"}, {"scale": 0}, {"num_pairs": "64"}, {"num_pairs": 64.5}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} .*must be .*give that of the run"):
            diagnose([4.8, 4.8], loss="supcon", settings={"num_pairs": 64} | settings)
