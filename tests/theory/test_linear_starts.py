"""Closed forms of linear Barlow Twins for tiny, degenerate and low-rank starts."""

import math

import mpmath
import pytest
import torch
from test_linear import integrate, normal, spectrum_to_gamma

from stepwise_lightning.theory import LinearBarlowTwins, feature_cross_correlation


def exact_uniform(gamma_values, weights0, t, digits=4000):
    """Return eigenvalues ν/(1+ν), ν of W(0) Γ e^{8Γt} W(0)ᵀ for a diagonal Γ > 0, with thousands of digits."""
    with mpmath.workdps(digits):
        d, m = weights0.shape
        growth = [mpmath.mpf(g) * mpmath.exp(8 * mpmath.mpf(g) * mpmath.mpf(t)) for g in gamma_values]
        w = mpmath.matrix(weights0.tolist())
        grown = mpmath.matrix(d, d)
        for i in range(d):
            for k in range(d):
                grown[i, k] = mpmath.fsum(w[i, j] * growth[j] * w[k, j] for j in range(m))
        nu = sorted(mpmath.eigsy(grown, eigvals_only=True), reverse=True)
        return [float(v / (1 + v)) for v in nu]


@pytest.mark.parametrize("t", [0.3, 1.5, 6.0])
def test_eigenvalues_span_thousands_of_orders_of_magnitude(t):
    values = [300.0, 90.0, 30.0, 3.0, 2.9, 0.5]  # e^{8 · 300 · 6} = 10^6254
    weights0 = normal(4, 6, 1e-12)
    theory = LinearBarlowTwins(torch.diag(torch.tensor(values, dtype=torch.float64)), weights0)
    predicted = theory.embedding_eigenvalues(t)
    expected = exact_uniform(values, weights0, t, digits=14000 if t > 3 else 4000)
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(predicted, expected, rtol=1e-9, atol=0)


def test_tiny_starts_and_long_times():
    gamma, _ = spectrum_to_gamma([2.0, 1.0, 0.5, 0.1, -0.3])
    weights0 = normal(3, 5, 1e-30)
    theory = LinearBarlowTwins(gamma, weights0)
    values = theory.embedding_eigenvalues(torch.tensor([0.0, 3.0, 30.0, 1e6]))
    c = (1e30 * weights0) @ gamma @ (1e30 * weights0).T
    torch.testing.assert_close(values[0] * 1e60, torch.linalg.eigvalsh(c).flip(0), rtol=1e-9, atol=0)
    assert (values[1:] > 0).all() and (values.diff(dim=0) >= 0).all()
    torch.testing.assert_close(values[-1], torch.ones(3).double())
    assert theory.singular_values(1e6).isfinite().all() and theory.step_times.isfinite().all()


def test_repeated_eigenvalues_are_exact():
    gamma, _ = spectrum_to_gamma([1.0, 1.0, 1.0, 1.0])
    weights0 = normal(3, 4, 0.2)
    times = torch.linspace(0, 1.5, 20)
    predicted = LinearBarlowTwins(gamma, weights0).embedding_eigenvalues(times)
    torch.testing.assert_close(predicted, integrate(gamma, weights0, times.numpy()), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "weights0",
    [
        normal(1, 5, 1e-3).expand(3, 5),  # identical rows
        torch.zeros(2, 5).double(),
        normal(3, 5, 1e-3) * torch.tensor([0.0, 1, 0, 1, 1]).double(),  # no component along modes 1 and 3
        normal(7, 5, 1e-3),  # d > m
        normal(4, 5, 1e-3) * torch.tensor([1.0, 1e-9, 1, 1e-15, 1]).double(),
    ],
    ids=["identical rows", "zero", "missing modes", "d > m", "graded"],
)
def test_degenerate_starts_match_integration(weights0):
    gamma = torch.diag(torch.tensor([2.0, 1.0, 0.5, 0.2, -0.1])).double()
    # At later times round-off in the integrator separates identical rows.
    times = torch.linspace(0, 3 if (weights0 == weights0[0]).all() else 20, 50)
    predicted = LinearBarlowTwins(gamma, weights0).embedding_eigenvalues(times)
    assert predicted.shape == (50, len(weights0))
    assert (predicted - integrate(gamma, weights0, times.numpy())).abs().max() < 2e-3


def test_start_of_lower_rank_is_finite_at_late_times_for_positive_gamma():
    """Rows of the start that depend on others stay at zero; all modes of the others are learned."""
    gamma = torch.eye(3, dtype=torch.float64)
    for weights0 in (normal(5, 3, 1e-3), normal(1, 3, 1e-3).expand(5, 3), torch.zeros(5, 3)):
        rank = int(torch.linalg.matrix_rank(weights0))
        expected = torch.tensor([1.0] * rank + [0.0] * (5 - rank), dtype=torch.float64)
        for rate in (None, 0.1):
            eigenvalues = LinearBarlowTwins(gamma, weights0, rate).embedding_eigenvalues(torch.tensor([1e6, math.inf]))
            torch.testing.assert_close(eigenvalues, expected.expand(2, 5), rtol=0, atol=1e-12)


def test_rank_deficient_gamma_has_no_spurious_modes():
    x1, x2 = normal(3, 10, 1.0), normal(3, 10, 1.0, 1)  # three pairs: at most three positive modes
    theory = LinearBarlowTwins(feature_cross_correlation(x1, x2), normal(6, 10, 1e-3))
    positive = int((theory.eigenvalues > 0).sum())
    assert positive <= 3
    assert theory.loss(math.inf) == pytest.approx(6 - positive, abs=1e-9)
