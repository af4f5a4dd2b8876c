"""Steps, rises, grown modes and crossing times of trajectories known in closed form."""

import math

import pytest
import torch

from stepwise_lightning.spectrum import crossing_times, detect_rises, detect_steps, num_crossed, num_grown


def sigmoid_modes(rates, delay=14.0, duration=8.0, samples=600):
    times = torch.linspace(0, duration, samples, dtype=torch.float64)
    return times, torch.sigmoid(torch.tensor(rates, dtype=torch.float64) * times[:, None] * 2 - delay)


def test_steps_of_separate_modes_match_the_logistic_curve():
    rates = [8.0, 4.0, 2.0]
    times, eigenvalues = sigmoid_modes(rates, duration=10)
    steps = detect_steps(times, eigenvalues[:, [1, 0, 2]])  # in any order of the columns
    odds = math.log(0.1 / 0.9)
    expected = torch.tensor([(14 + odds) / (2 * r) for r in rates], dtype=torch.float64)
    torch.testing.assert_close(steps.step_times, expected, rtol=2e-3, atol=0)
    widths = torch.tensor([(odds - math.log(0.01 / 0.99)) / (2 * r) for r in rates], dtype=torch.float64)
    torch.testing.assert_close(steps.rise_widths, widths, rtol=2e-2, atol=0)
    assert steps.num_distinct == 3
    assert steps.stepwiseness == pytest.approx(float(((expected[1:] - expected[:-1]) / widths[1:]).mean()), rel=0.03)
    assert steps.num_learned[0] == 0 and steps.num_learned[-1] == 3 and steps.num_learned.shape == times.shape
    assert steps.threshold == pytest.approx(0.1, rel=1e-6)


def test_threshold_of_a_longer_run_gives_its_steps():
    times, eigenvalues = sigmoid_modes([8.0, 4.0, 2.0], duration=10)
    whole = detect_steps(times, eigenvalues)
    begun = times < 0.8  # before the first plateau
    part = detect_steps(times[begun], eigenvalues[begun], whole.threshold)
    assert part.step_times[0] == whole.step_times[0] > detect_steps(times[begun], eigenvalues[begun]).step_times[0]
    assert part.threshold == whole.threshold and part.step_times[1:].isnan().all()


def test_modes_that_rise_together_are_one_distinct_step():
    times, eigenvalues = sigmoid_modes([4.0, 3.9, 2.0])
    assert detect_steps(times, eigenvalues).num_distinct == 2


def test_steps_one_width_apart_have_no_plateaus_between_them():
    width = math.log(0.1 / 0.9) - math.log(0.01 / 0.99)  # of a logistic curve
    times = torch.linspace(0, 40, 2000, dtype=torch.float64)
    for spacing, plateaus in ((1.05, 1), (3.2, 8)):
        starts = 8 + spacing * width * torch.arange(8, dtype=torch.float64)
        steps = detect_steps(spacing * times, torch.sigmoid(spacing * times[:, None] - starts))
        assert (steps.num_distinct, steps.num_plateaus, int(steps.num_learned[-1])) == (8, plateaus, 8)


def test_mode_that_decays_after_its_step_is_not_counted():
    times, eigenvalues = sigmoid_modes([8.0, 4.0], duration=10)
    eigenvalues[:, 1] *= torch.sigmoid(8 * (6 - times))
    steps = detect_steps(times, eigenvalues)
    assert int(steps.num_learned[-1]) == steps.num_distinct == steps.num_plateaus == 1 and steps.stepwiseness == 0
    assert steps.step_times.isfinite().all()


@pytest.mark.parametrize("size", [4.0, 100.0])
def test_late_large_mode_does_not_hide_earlier_steps(size):
    times, eigenvalues = sigmoid_modes([8.0, 4.0, 2.0], duration=8)
    plain = detect_steps(times, eigenvalues)
    late = torch.stack([*eigenvalues[:, :2].T, size * torch.sigmoid(8 * (times - 6))], 1)
    steps = detect_steps(times, late)
    assert steps.num_distinct == 3 and steps.threshold == pytest.approx(plain.threshold, rel=0.01)
    torch.testing.assert_close(steps.step_times[:2], plain.step_times[:2], rtol=1e-3, atol=0)
    assert detect_steps(times, late[:, 2:]).threshold == pytest.approx(size / 10, rel=0.01)  # alone


def test_modes_that_start_large_or_never_rise_have_no_step():
    times, rising = sigmoid_modes([4.0])
    high = torch.linspace(0.05, 1, len(times)).double()[:, None]
    never = torch.full_like(high, -1e-9)
    steps = detect_steps(times, torch.cat([high, rising, never], 1))
    assert torch.isnan(steps.step_times).sum() == 2 and steps.num_distinct == 1
    assert steps.num_learned[-1] == 2
    assert detect_steps(times, never).num_distinct == 0
    assert detect_steps(times, torch.zeros(len(times), 3)).num_learned.sum() == 0


def test_spike_of_one_sample_is_no_step():
    times, eigenvalues = sigmoid_modes([2.0])
    spiked = eigenvalues.clone()
    spiked[100] = 1.0
    torch.testing.assert_close(detect_steps(times, spiked).step_times, detect_steps(times, eigenvalues).step_times)


def test_crossing_times_interpolate_the_log_odds():
    times = torch.linspace(0, 4, 25, dtype=torch.float64)  # coarse
    eigenvalues = torch.sigmoid(6 * times[:, None] - torch.tensor([7.0, 11.0, 90.0, -3.0], dtype=torch.float64))
    crossed = crossing_times(times, eigenvalues)
    torch.testing.assert_close(crossed[:2], torch.tensor([7 / 6, 11 / 6], dtype=torch.float64), rtol=1e-9, atol=0)
    assert torch.isnan(crossed[2:]).all()


def test_num_grown_requires_tenfold_growth_and_a_tenth_of_the_largest():
    start = torch.tensor([1.0, 1e-3, 1e-3, 1e-6])
    assert num_grown(start, start) == 0
    assert num_grown(start, torch.tensor([2.0, 0.3, 0.1, 1e-3])) == 1  # large; grown; too small; too small
    assert num_grown(start, torch.tensor([11.0, 1.2, 0.3, 0.2])) == 2


def test_num_crossed_counts_eigenvalues_above_the_level():
    assert num_crossed(torch.tensor([[0.9, 0.5, 0.1], [1.0, 0.6, 0.51]])).tolist() == [1, 3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: detect_steps(torch.arange(3), torch.ones(4, 2)), r"\(3,\), \(4, 2\)"),
        (lambda: detect_steps(torch.zeros(4), torch.ones(4, 2)), "ascending"),
        (lambda: detect_steps(torch.arange(4), torch.full((4, 2), math.nan)), "NaN"),
        (lambda: crossing_times(torch.arange(4), torch.ones(4, 2), level=2), "between 0 and 1"),
    ],
)
def test_invalid_input_raises_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_rises_of_separate_modes_match_the_logistic_curve():
    rates = [8.0, 4.0, 2.0]
    times, eigenvalues = sigmoid_modes(rates, duration=12, samples=4000)
    rises = detect_rises(times, eigenvalues[:, [2, 0, 1]])
    torch.testing.assert_close(rises.times, torch.tensor([7 / r for r in rates]).double(), rtol=1e-4, atol=0)
    widths = torch.tensor([math.log(9) / (2 * r) for r in rates]).double()
    torch.testing.assert_close(rises.widths, widths, rtol=1e-3, atol=0)
    assert rises.num_apart == rises.num_modes == 3
    separations = (7 / 4 - 7 / 8) / widths[1], (7 / 2 - 7 / 4) / widths[2]
    assert rises.separation == pytest.approx(float(sum(separations)) / 2, rel=0.01)


def test_modes_that_rise_together_are_not_apart_from_any_start():
    times, together = sigmoid_modes([4.0, 3.5, 3.0])
    for start in (0.0, 0.3):  # detect_steps finds nothing from 0.3
        values = start + (1 - start) * together
        assert detect_rises(times, values)[2:4] == (3, 1)
    _, apart = sigmoid_modes([8.0, 4.0, 2.0])
    assert detect_rises(times, 0.3 + 0.7 * apart)[2:4] == (3, 3)
    assert detect_steps(times, 0.3 + 0.7 * apart).num_distinct == 0


def test_rise_starts_at_the_minimum_of_a_mode():
    times, rising = sigmoid_modes([8.0, 4.0], delay=30.0)
    decaying = 0.6 * torch.exp(-8 * times)[:, None]
    plain, after_decay = detect_rises(times, rising), detect_rises(times, rising + decaying)
    assert after_decay.num_apart == 2
    torch.testing.assert_close(after_decay.times, plain.times, rtol=1e-3, atol=0)


def test_mode_that_ends_small_or_never_rises_is_not_counted():
    times, rising = sigmoid_modes([4.0])
    low, constant = 0.05 * rising, torch.full_like(rising, 1.5)
    assert detect_rises(times, torch.cat([rising, low], 1)).num_modes == 1
    assert detect_rises(times, torch.cat([rising, constant], 1)).num_modes == 1
    assert detect_rises(times, torch.zeros(len(times), 3))[2:] == (0, 0, 0.0)
