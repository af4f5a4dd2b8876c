"""Exact inference from independent runs, against enumeration and SciPy."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from reproduce.inference import holm, paired_difference, prediction_interval, success_bound


def rank_sum(d):
    return float((np.sign(d) * stats.rankdata(np.abs(d))).sum())


def flipped(d):
    """Return the rank sums of all sign flips."""
    return np.array([rank_sum(d * np.array(signs)) for signs in itertools.product((1, -1), repeat=len(d))])


@pytest.mark.parametrize(("successes", "runs", "bound"), [(20, 20, 0.861), (10, 10, 0.741), (17, 20, 0.656), (0, 9, 0)])
def test_success_bound_is_that_of_clopper_and_pearson(successes, runs, bound):
    low = success_bound(successes, runs)
    assert low == pytest.approx(bound, abs=5e-4)
    assert successes == 0 or stats.binom.sf(successes - 1, runs, low) == pytest.approx(0.05)


@pytest.mark.parametrize(
    "d", [[0.3, -0.1, 0.8, 1.1, 0.2], [1, 1, -1, 2, 2, 3], [0, 0, 1, 2, -1], [math.inf, 2, -1], [0, 0]], ids=str
)
def test_p_value_counts_all_sign_flips(d):
    d = np.array(d, float)
    ranked = np.where(np.isinf(d), np.sign(d) * 1e9, d)
    ranked = ranked[ranked != 0]
    assert paired_difference(d).p == pytest.approx((flipped(ranked) >= rank_sum(ranked)).mean())


def test_p_value_and_interval_agree_with_scipy_and_enumeration():
    d = np.random.default_rng(0).normal(0.7, 1, 8)
    result = paired_difference(d)
    assert result.p == pytest.approx(stats.wilcoxon(d, alternative="greater", method="exact").pvalue)
    assert result.estimate == pytest.approx(np.median([(a + b) / 2 for i, a in enumerate(d) for b in d[i:]]))

    def accepted(shift):
        sums, observed = flipped(d - shift), rank_sum(d - shift)
        return 2 * min((sums <= observed).mean(), (sums >= observed).mean()) > 0.05

    for end, inward in ((result.low, 1e-6), (result.high, -1e-6)):
        assert accepted(end + inward) and not accepted(end - inward)


def test_interval_is_infinite_for_five_differences_and_finite_for_six():
    assert paired_difference([1, 2, 3, 4, 5]).low == -math.inf
    six = paired_difference([1, 2, 3, 4, 5, 6])
    assert (six.low, six.high, six.p) == (1, 6, 1 / 64)


def test_missing_difference_counts_against_the_run():
    result = paired_difference([1.0] * 9 + [math.nan])
    assert result.p > paired_difference([1.0] * 9 + [1e-9]).p and result.estimate == 1 and result.low == -math.inf


def test_holm_multiplies_by_the_number_of_remaining_tests():
    assert holm([0.01, 0.04, 0.03, 0.9]) == pytest.approx([0.04, 0.09, 0.09, 0.9])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


def test_prediction_interval_covers_a_new_run_at_its_level():
    draws = np.random.default_rng(0).normal(3, 2, (600, 11))
    inside = [low <= new <= high for *runs, new in draws for low, high in [prediction_interval(runs, 0.9)]]
    assert np.mean(inside) == pytest.approx(0.9, abs=0.03)
    assert prediction_interval([5, 5, 5], 0.99) == (5, 5)
    assert prediction_interval([1.0, math.inf], 0.9) is None is prediction_interval([1.0], 0.9)
