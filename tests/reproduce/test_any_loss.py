"""Figure any_loss: measured and predicted growth rates, and the claims."""

from argparse import Namespace

import pytest
import torch

from reproduce.figures import any_loss

SMOKE = {"data": "photos", "root": None, "download": False} | any_loss.PROFILES["smoke"]


@pytest.fixture(scope="module")
def results():
    """Train a linear model with one isotropic loss, one loss with a bias and one with preferred directions."""
    with pytest.MonkeyPatch.context() as patch:
        chosen = {name: any_loss.LOSSES[name] for name in ("Barlow Twins", "SimCLR", "LeJEPA")}
        patch.setattr(any_loss, "LOSSES", chosen)
        return any_loss.experiment("linear model", 0, Namespace(**SMOKE))


def test_growth_rates_of_a_linear_model_match_the_prediction_and_no_rival(results):
    assert [result.loss for result in results] == ["Barlow Twins", "SimCLR", "LeJEPA"]
    for result in results:
        assert result.growth[-1, 0] == pytest.approx(any_loss.GROWTH, rel=0.25)
        assert result.largest_error("own signature") < 1e-3
        assert min(result.largest_error(rival) for rival in any_loss.RIVALS[1:]) > 0.4


def test_claims_hold_and_fail_with_one_common_rate(results):
    by_run = dict.fromkeys([(model, 0) for model in any_loss.MAX_ERROR], results)
    claims = any_loss._claims(by_run, [0])
    assert [claim.name for claim in claims] == [
        *("linear_rates", "linear_median", "linear_order", "linear_closed_form"),
        *("wide_rates", "wide_median", "wide_order", "wide_closed_form"),
        *("resnet_rates", "resnet_median", "resnet_order"),
    ]
    assert all(claim.holds for claim in claims)
    for result in results:
        result.errors["own signature"] = result.errors["one common rate"]
    assert {claim.name for claim in any_loss._claims(by_run, [0]) if claim.holds} == {
        "linear_order", "linear_closed_form", "wide_order", "wide_closed_form", "resnet_order",
    }  # fmt: skip


def test_closed_forms_reject_a_wrong_loss(results):
    closed_forms = [result.largest_error(any_loss.CLOSED_FORM) for result in results[:2]]
    assert max(closed_forms) < 1e-3 < 0.01 < results[1].largest_error(any_loss.VARIANT)
    assert any_loss.CLOSED_FORM not in results[2].errors  # LeJEPA


def test_measured_rates_include_finite_steps():
    rates, learning_rate = torch.tensor([20.0, 3.0, -1.0]).double(), 0.01
    amplitudes = torch.tensor([0.1, 2.0, 5.0]) * (1 + learning_rate * rates) ** torch.arange(8.0)[:, None]
    torch.testing.assert_close(any_loss.measured_rates(amplitudes, learning_rate), rates)


def test_rank_correlation():
    x, y = torch.tensor([[1.0, 5.0], [2.0, 9.0]]), torch.tensor([[2.0, 6.0], [7.0, 8.0]])
    assert any_loss.correlation(x, -y.exp()) == pytest.approx(-any_loss.correlation(x, y)) == pytest.approx(-0.8)
