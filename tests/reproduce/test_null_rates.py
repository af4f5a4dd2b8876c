"""False-positive rates of the step detectors."""

import pytest

from reproduce.null_rates import false_positive_rates


@pytest.mark.parametrize("kind", ["white", "AR(1)", "random walk"])
def test_stationary_noise_of_a_tenth_has_no_steps_and_no_rises(kind):
    assert max(false_positive_rates(kind, 0.1, runs=60).values()) <= 0.02


def test_modes_that_grow_together_have_no_plateaus():
    rates = false_positive_rates("together", 0.1, runs=60)
    assert rates["two plateaus"] <= 0.02 and rates["separation ≥ 1"] <= 0.02 and rates["a grown mode"] == 1
    one_rate = false_positive_rates("one rate", 0.0, runs=3)
    assert (one_rate["two distinct steps"], one_rate["two plateaus"]) == (1, 0)
