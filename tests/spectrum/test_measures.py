"""Eigenvalues against exact spectra and brute force; rank measures against their definitions; the step detector."""

import math

import numpy as np
import pytest
import torch

from stepwise_lightning.spectrum.measures import (
    alpha_req,
    cross_correlation_eigenvalues,
    crossing_times,
    detect_steps,
    effective_rank,
    embedding_eigenvalues,
    participation_ratio,
    rankme,
)


def orthonormal(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("n", "d"), [(200, 10), (30, 80)])
def test_eigenvalues_down_to_1e_12_of_the_largest(n, d):
    rank = min(n, d)
    exact = torch.logspace(2, -10, rank, dtype=torch.float64)
    z = n**0.5 * (orthonormal(n, rank, 0) * exact.sqrt()) @ orthonormal(d, rank, 1).T
    eigenvalues = embedding_eigenvalues(z, center=False)
    assert eigenvalues.shape == (d,) and eigenvalues.dtype == torch.float64
    torch.testing.assert_close(eigenvalues[:rank], exact, rtol=1e-3, atol=0)
    torch.testing.assert_close(cross_correlation_eigenvalues(z, z)[:rank], exact, rtol=1e-3, atol=0)
    assert (eigenvalues[rank:] == 0).all()


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize(("n", "d"), [(50, 7), (6, 40)])
def test_eigenvalues_against_their_definition(n, d, center):
    z1, z2 = normal(n, d, 0) + 1, normal(n, d, 1) + 2
    a, b = (z1 - z1.mean(0), z2 - z2.mean(0)) if center else (z1, z2)
    covariance = sum(torch.outer(row, row) for row in a) / n
    torch.testing.assert_close(embedding_eigenvalues(z1, center), torch.linalg.eigvalsh(covariance).flip(0))
    c = sum(torch.outer(u, v) + torch.outer(v, u) for u, v in zip(a, b, strict=True)) / (2 * n)
    torch.testing.assert_close(cross_correlation_eigenvalues(z1, z2, center), torch.linalg.eigvalsh(c).flip(0))


def test_float32_embeddings_are_cast_before_the_covariance():
    exact = torch.tensor([1.0, 1e-10], dtype=torch.float64)
    z = (orthonormal(64, 2, 0) * exact.sqrt() * 8).float()  # a float32 covariance would lose 1e-10
    torch.testing.assert_close(embedding_eigenvalues(z, center=False), exact, rtol=1e-3, atol=0)


def test_rank_measures_of_known_spectra():
    flat = torch.tensor([[2.0, 2, 2, 2], [5, 0, 0, 0], [3, 3, 0, -1e-18]])
    expected = torch.tensor([4.0, 1, 2], dtype=torch.float64)
    torch.testing.assert_close(effective_rank(flat), expected)
    torch.testing.assert_close(participation_ratio(flat), expected)
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    assert float(effective_rank(7 * p)) == pytest.approx(math.exp(-sum(x * math.log(x) for x in p.tolist())))
    assert float(participation_ratio(7 * p)) == pytest.approx(1 / (0.25 + 0.09 + 0.04))


def test_alpha_req_recovers_a_power_law_and_ignores_round_off():
    k = torch.arange(1, 60, dtype=torch.float64)
    spectrum = torch.cat([3 * k**-1.4, torch.tensor([1e-18, 0, -1e-18], dtype=torch.float64)])
    assert float(alpha_req(spectrum)) == pytest.approx(1.4)
    x, y = np.log(np.arange(1, 6)), np.log([5.0, 2.0, 1.5, 0.2, 0.1])
    assert float(alpha_req(torch.tensor([5.0, 2.0, 1.5, 0.2, 0.1]).double())) == pytest.approx(-np.polyfit(x, y, 1)[0])
    assert math.isnan(float(alpha_req(torch.tensor([1.0, 0, 0]))))


def test_rankme_uses_singular_values_as_its_paper_does():
    z = normal(40, 6) @ torch.diag(torch.tensor([1.0, 1, 1, 0.1, 0.1, 0]).double())
    sigma = np.linalg.svd(z.numpy(), compute_uv=False)
    p = sigma / sigma.sum() + 1e-7
    assert float(rankme(z)) == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert float(rankme(torch.eye(5))) == pytest.approx(5, abs=1e-5)


def test_a_collapsed_embedding_has_rank_zero():
    z = torch.ones(20, 4)
    eigenvalues = embedding_eigenvalues(z)
    assert float(effective_rank(eigenvalues)) == float(participation_ratio(eigenvalues)) == 0
    assert float(rankme(torch.zeros(20, 4))) == 0


def sigmoid_modes(rates, delay=14.0, duration=8.0, samples=600):
    times = torch.linspace(0, duration, samples, dtype=torch.float64)
    return times, torch.sigmoid(torch.tensor(rates, dtype=torch.float64) * times[:, None] * 2 - delay)


def test_detector_on_separate_modes():
    rates = [8.0, 4.0, 2.0]
    times, eigenvalues = sigmoid_modes(rates, duration=10)
    steps = detect_steps(times, eigenvalues[:, [1, 0, 2]])  # the order of the columns does not matter
    odds = math.log(0.1 / 0.9)
    expected = torch.tensor([(14 + odds) / (2 * r) for r in rates], dtype=torch.float64)
    torch.testing.assert_close(steps.step_times, expected, rtol=2e-3, atol=0)
    widths = torch.tensor([(odds - math.log(0.01 / 0.99)) / (2 * r) for r in rates], dtype=torch.float64)
    torch.testing.assert_close(steps.rise_widths, widths, rtol=2e-2, atol=0)
    assert steps.num_distinct == 3
    assert steps.stepwiseness == pytest.approx(float(((expected[1:] - expected[:-1]) / widths[1:]).mean()), rel=0.03)
    assert steps.num_learned[0] == 0 and steps.num_learned[-1] == 3 and steps.num_learned.shape == times.shape
    assert steps.threshold == pytest.approx(0.1, rel=1e-6)


def test_detector_merges_modes_that_rise_together():
    times, eigenvalues = sigmoid_modes([4.0, 3.9, 2.0])
    assert detect_steps(times, eigenvalues).num_distinct == 2


def test_modes_that_start_high_or_never_rise_are_no_steps():
    times, rising = sigmoid_modes([4.0])
    high = torch.linspace(0.05, 1, len(times)).double()[:, None]
    never = torch.full_like(high, -1e-9)
    steps = detect_steps(times, torch.cat([high, rising, never], 1))
    assert torch.isnan(steps.step_times).sum() == 2 and steps.num_distinct == 1
    assert steps.num_learned[-1] == 2
    assert detect_steps(times, never).num_distinct == 0
    assert detect_steps(times, torch.zeros(len(times), 3)).num_learned.sum() == 0


def test_a_spike_of_one_sample_is_not_a_step():
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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: embedding_eigenvalues(torch.ones(3)), "shape"),
        (lambda: embedding_eigenvalues(torch.ones(0, 3)), "not be empty"),
        (lambda: embedding_eigenvalues(torch.full((3, 2), math.nan)), "NaN"),
        (lambda: rankme(torch.full((3, 2), math.inf)), "infinite"),
        (lambda: cross_correlation_eigenvalues(torch.ones(3, 2), torch.ones(3, 4)), r"\(3, 2\) and \(3, 4\)"),
        (lambda: detect_steps(torch.arange(3), torch.ones(4, 2)), r"\(3,\), \(4, 2\)"),
        (lambda: detect_steps(torch.zeros(4), torch.ones(4, 2)), "ascending"),
        (lambda: detect_steps(torch.arange(4), torch.full((4, 2), math.nan)), "NaN"),
        (lambda: crossing_times(torch.arange(4), torch.ones(4, 2), level=2), "between 0 and 1"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as refusal:
        call()
    assert "\n" not in str(refusal.value)
