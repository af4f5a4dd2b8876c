"""Closed forms of linear Barlow Twins against numerical integration, gradient descent and exact arithmetic."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from stepwise_lightning.theory import LinearBarlowTwins, feature_cross_correlation


def spectrum_to_gamma(eigenvalues, seed=0):
    """Return Γ with the given eigenvalues in a random orthonormal basis, and the basis."""
    generator = torch.Generator().manual_seed(seed)
    m = len(eigenvalues)
    basis = torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=torch.float64)).Q
    values = torch.tensor(eigenvalues, dtype=torch.float64)
    gamma = (basis * values) @ basis.T
    return (gamma + gamma.T) / 2, basis


def normal(d, m, scale, seed=0):
    return scale * torch.randn(d, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def aligned(basis, singular_values, seed=3):
    d = len(singular_values)
    rotation = torch.linalg.qr(normal(d, d, 1.0, seed)).Q
    return (rotation * torch.tensor(singular_values, dtype=torch.float64)) @ basis[:, :d].T


def integrate(gamma, weights0, times):
    """Return eigenvalues of C along dW/dt = −4 (WΓWᵀ − I) WΓ, by an adaptive Runge-Kutta method."""
    g, shape = gamma.numpy(), tuple(weights0.shape)

    def flow(_, flat):
        w = flat.reshape(shape)
        wg = w @ g
        return (-4 * (wg @ w.T - np.eye(shape[0])) @ wg).ravel()

    times = times.astype(np.float64)  # NumPy below 2 integrates in the type of the times
    solution = solve_ivp(flow, (0, times[-1]), weights0.numpy().ravel(), "DOP853", t_eval=times, rtol=1e-11, atol=1e-16)
    c = [w.reshape(shape) @ g @ w.reshape(shape).T for w in solution.y.T]
    return torch.tensor(np.array([np.linalg.eigvalsh((a + a.T) / 2)[::-1] for a in c]))


def descend(gamma, weights0, rate, steps):
    """Return eigenvalues of C at each step of gradient descent on ‖C − I‖²_F, with gradients by autograd."""
    weights = weights0.clone().requires_grad_()
    eigenvalues = []
    for _ in range(steps + 1):
        c = weights @ gamma @ weights.T
        eigenvalues.append(torch.linalg.eigvalsh(c.detach()).flip(0))
        (gradient,) = torch.autograd.grad((c - torch.eye(len(c))).square().sum(), weights)
        weights = (weights - rate * gradient).detach().requires_grad_()
    return torch.stack(eigenvalues)


MIXED = [3.0, 2.0, 0.7, 0.0, -0.4, -1.5]
ALIGNED_START = [1e-2, 3e-3, 2e-2, 1e-2, 3e-2, 1e-2]


def test_feature_cross_correlation_is_shared_content_minus_noise():
    x1, x2 = normal(20, 6, 1.0, 0), normal(20, 6, 1.0, 1)
    mean, half_difference = (x1 + x2) / 2, (x1 - x2) / 2
    expected = sum(torch.outer(u, u) - torch.outer(v, v) for u, v in zip(mean, half_difference, strict=True)) / len(x1)
    gamma = feature_cross_correlation(x1.float().reshape(20, 2, 3), x2.float().reshape(20, 2, 3))
    assert gamma.dtype == torch.float64
    torch.testing.assert_close(gamma, expected, rtol=0, atol=1e-6)


def test_aligned_start_solves_the_differential_equation():
    gamma, basis = spectrum_to_gamma(MIXED)
    theory = LinearBarlowTwins(gamma, aligned(basis, ALIGNED_START))
    times, h = torch.tensor([0.1, 0.4, 0.9, 2.0]).double(), 1e-5
    derivative = (theory.weights(times + h) - theory.weights(times - h)) / (2 * h)
    w = theory.weights(times)
    flow = -4 * (w @ gamma @ w.mT - torch.eye(6)) @ w @ gamma
    torch.testing.assert_close(derivative, flow, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", ["uniform", "qr"])
def test_aligned_start_matches_the_integrated_flow_for_every_sign(method):
    gamma, basis = spectrum_to_gamma(MIXED)
    weights0 = aligned(basis, ALIGNED_START)
    times = torch.linspace(0, 3, 40)
    theory = LinearBarlowTwins(gamma, weights0)
    measured = integrate(gamma, weights0, times.numpy())
    predicted = theory.embedding_eigenvalues(times, method).sort(descending=True).values
    torch.testing.assert_close(predicted, measured, rtol=0, atol=1e-9)
    torch.testing.assert_close(theory.loss(times, method), (1 - measured).square().sum(1), rtol=0, atol=1e-8)


def test_large_aligned_start_is_exact():
    gamma, basis = spectrum_to_gamma(MIXED)
    weights0 = aligned(basis, [0.9, 0.2, 1.1, 0.5, 0.3, 0.4])  # some eigenvalues of C start above 1
    times = torch.linspace(0, 2, 30)
    predicted = LinearBarlowTwins(gamma, weights0).embedding_eigenvalues(times)
    torch.testing.assert_close(predicted, integrate(gamma, weights0, times.numpy()), rtol=0, atol=1e-8)


def test_uniform_form_is_accurate_for_close_neighbours():
    gamma, _ = spectrum_to_gamma([2.0, 1.98, 1.0, 0.99, 0.98, 0.3, -0.2, -0.5])
    weights0 = normal(4, 8, 1e-5)
    times = torch.linspace(0, 4, 60)
    theory = LinearBarlowTwins(gamma, weights0)
    measured = integrate(gamma, weights0, times.numpy())
    assert (theory.embedding_eigenvalues(times) - measured).abs().max() < 1e-4
    assert (theory.embedding_eigenvalues(times, "qr") - measured).abs().max() > 0.1
    assert theory.neighbour_overlap[0] > 0.5


@pytest.mark.parametrize(("scale", "smallest", "largest"), [(1e-3, 0.0015, 0.02), (1e-5, 0.001, 0.006)])
def test_uniform_error_of_the_documentation_for_neighbours_with_a_ratio_of_four_fifths(scale, smallest, largest):
    gamma = torch.diag(0.8 ** torch.arange(8, dtype=torch.float64))
    errors = []
    for seed in range(3):
        weights0 = scale * torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)).double()
        theory = LinearBarlowTwins(gamma, weights0)
        times = torch.linspace(0, float(theory.crossing_times(0.99).max()), 100).double()
        measured = integrate(gamma, weights0, times.numpy())
        errors.append(float((theory.embedding_eigenvalues(times) - measured).abs().max()))
    assert smallest < min(errors) and max(errors) < largest


def test_uniform_error_vanishes_with_the_start():
    gamma, _ = spectrum_to_gamma([3.0, 1.5, 1.0, 0.6, 0.2, -0.3])
    times = torch.linspace(0, 8, 60)
    errors = []
    for scale in (1e-1, 1e-2, 1e-3):
        weights0 = normal(3, 6, scale)
        predicted = LinearBarlowTwins(gamma, weights0).embedding_eigenvalues(times)
        errors.append((predicted - integrate(gamma, weights0, times.numpy())).abs().max())
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 5e-3


@pytest.mark.parametrize("method", ["uniform", "qr"])
@pytest.mark.parametrize("learning_rate", [None, 0.01])
def test_eigenvalues_at_start_and_end(method, learning_rate):
    gamma, basis = spectrum_to_gamma(MIXED)
    theory = LinearBarlowTwins(gamma, aligned(basis, ALIGNED_START), learning_rate)
    start = torch.tensor([g * s * s for g, s in zip(MIXED, ALIGNED_START, strict=True)], dtype=torch.float64)
    predicted = theory.embedding_eigenvalues(0.0, method)
    torch.testing.assert_close(predicted, start.sort(descending=True).values if method == "uniform" else start)
    for end in (math.inf, 1e6):
        expected = torch.tensor([1.0, 1, 1, 0, 0, 0]).double()
        torch.testing.assert_close(theory.embedding_eigenvalues(end, method), expected, rtol=0, atol=1e-12)
        assert theory.loss(end, method) == pytest.approx(3, abs=1e-12)  # d − number of positive modes


def test_singular_value_limits():
    gamma, basis = spectrum_to_gamma(MIXED)
    s = LinearBarlowTwins(gamma, aligned(basis, ALIGNED_START)).singular_values(math.inf)
    expected = torch.tensor([3**-0.5, 2**-0.5, 0.7**-0.5, ALIGNED_START[3], 0, 0], dtype=torch.float64)
    torch.testing.assert_close(s, expected, rtol=1e-9, atol=1e-12)


def test_generic_start_at_time_zero_keeps_negative_eigenvalues():
    gamma, _ = spectrum_to_gamma([2.0, 1.0, -0.5, -3.0])
    weights0 = normal(4, 4, 1e-2)
    c = weights0 @ gamma @ weights0.T
    predicted = LinearBarlowTwins(gamma, weights0).embedding_eigenvalues(0.0)
    torch.testing.assert_close(predicted, torch.linalg.eigvalsh(c).flip(0), rtol=1e-9, atol=0)


def test_eigenvalues_at_step_times_are_one_half():
    gamma, basis = spectrum_to_gamma([3.0, 2.0, 0.7, -1.0])
    theory = LinearBarlowTwins(gamma, aligned(basis, [1e-4, 1e-3, 1e-3, 1e-3]))
    learned = theory.step_times[:3]
    s0, g = theory.initial_singular_values[:3], theory.eigenvalues[:3]
    at_steps = theory.embedding_eigenvalues(learned, "qr").diagonal()
    torch.testing.assert_close(at_steps, 1 / (2 - s0**2 * g), rtol=1e-12, atol=0)
    assert theory.step_times[3] == math.inf
    torch.testing.assert_close(theory.crossing_times().sort().values[:3], learned.sort().values, rtol=1e-6, atol=0)
    assert theory.crossing_times()[3] == math.inf


def test_aligned_gradient_descent_matches_the_finite_step_recursion():
    gamma, basis = spectrum_to_gamma([1.0, 0.6, 0.3, -0.2])
    weights0, rate = aligned(basis, [1e-3, 2e-3, 1e-2, 0.3]), 0.1  # 4ηγ_1 = 0.4
    measured = descend(gamma, weights0, rate, 150)
    times = rate * torch.arange(151)
    theory = LinearBarlowTwins(gamma, weights0, learning_rate=rate)
    predicted = theory.embedding_eigenvalues(times, "qr").sort(descending=True).values
    torch.testing.assert_close(predicted, measured, rtol=0, atol=1e-10)
    flow = LinearBarlowTwins(gamma, weights0).embedding_eigenvalues(times)
    assert (flow - measured).abs().max() > 0.1


@pytest.mark.parametrize(("relative_rate", "bound"), [(0.1, 2.5e-3), (0.05, 7e-4)])
def test_generic_gradient_descent_matches_the_finite_step_uniform_form(relative_rate, bound):
    gamma, _ = spectrum_to_gamma([2.0, 1.95, 1.0, 0.9, 0.2, -0.3])
    rate = relative_rate / (4 * 2.0)
    weights0 = normal(4, 6, 1e-5)
    steps = round(9 / rate)
    measured = descend(gamma, weights0, rate, steps)
    times = rate * torch.arange(steps + 1)
    theory = LinearBarlowTwins(gamma, weights0, learning_rate=rate)
    assert (theory.embedding_eigenvalues(times) - measured).abs().max() < bound


def test_shapes_and_dtypes():
    gamma, _ = spectrum_to_gamma([2.0, 1.0, 0.5, -0.3])
    theory = LinearBarlowTwins(gamma.float(), normal(2, 4, 1e-2).float())
    for t, lead in ((0.5, ()), (torch.tensor(0.5), ()), (torch.tensor([0.5, 1]), (2,)), (np.array([0.5]), (1,))):
        assert theory.singular_values(t).shape == (*lead, 2)
        assert theory.embedding_eigenvalues(t).shape == (*lead, 2)
        assert theory.embedding_eigenvalues(t, "qr").shape == (*lead, 2)
        assert theory.loss(t).shape == lead
        assert theory.weights(t).shape == (*lead, 2, 4)
    assert theory.eigenvalues.shape == theory.step_times.shape == theory.initial_singular_values.shape == (2,)
    assert theory.eigenvectors.shape == (4, 2) and theory.rotation.shape == (2, 2)
    assert theory.embedding_eigenvalues(0.5).dtype == torch.float64
    double = LinearBarlowTwins(gamma, normal(2, 4, 1e-2))
    times = torch.linspace(0, 3, 9)
    difference = theory.embedding_eigenvalues(times) - double.embedding_eigenvalues(times)
    assert difference.abs().max() < 1e-5


@pytest.mark.gpu
def test_on_a_gpu():
    gamma, _ = spectrum_to_gamma([2.0, 1.0, 0.5, -0.3])
    times = torch.linspace(0, 3, 9)
    on_cpu = LinearBarlowTwins(gamma, normal(2, 4, 1e-2))
    on_gpu = LinearBarlowTwins(gamma.cuda(), normal(2, 4, 1e-2).cuda())
    assert on_gpu.embedding_eigenvalues(times).is_cuda
    torch.testing.assert_close(on_gpu.embedding_eigenvalues(times).cpu(), on_cpu.embedding_eigenvalues(times))


GAMMA = torch.diag(torch.tensor([2.0, 1.0, -0.5])).double()
WEIGHTS = torch.full((2, 3), 0.1).double()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LinearBarlowTwins(GAMMA[:2], WEIGHTS), "square"),
        (lambda: LinearBarlowTwins(GAMMA, WEIGHTS[:, :2]), "m = 3"),
        (lambda: LinearBarlowTwins(GAMMA, WEIGHTS[:0]), "d ≥ 1"),
        (lambda: LinearBarlowTwins(GAMMA, WEIGHTS * math.nan), "weights0 contains NaN"),
        (lambda: LinearBarlowTwins(GAMMA * math.inf, WEIGHTS), "gamma contains NaN"),
        (lambda: LinearBarlowTwins(GAMMA + torch.ones(3, 3).triu(1), WEIGHTS), "symmetric"),
        (lambda: LinearBarlowTwins(GAMMA, WEIGHTS, learning_rate=0.125), r"1/\(4γ_1\) = 0.125"),
        (lambda: LinearBarlowTwins(GAMMA, WEIGHTS, learning_rate=0.0), "γ_1 = 2 the largest .*, got 0"),
        (lambda: LinearBarlowTwins(GAMMA, WEIGHTS).loss(-1.0), "t must be ≥ 0"),
        (lambda: LinearBarlowTwins(GAMMA, WEIGHTS).loss(torch.ones(2, 2)), "scalar or a vector"),
        (lambda: LinearBarlowTwins(GAMMA, WEIGHTS).embedding_eigenvalues(1.0, "exact"), "'uniform' or 'qr'"),
        (lambda: LinearBarlowTwins(GAMMA, WEIGHTS).crossing_times(1.0), "between 0 and 1"),
        (lambda: feature_cross_correlation(torch.ones(3, 4), torch.ones(3, 5)), r"\(3, 4\) and \(3, 5\)"),
        (lambda: feature_cross_correlation(torch.ones(0, 4), torch.ones(0, 4)), "not be empty"),
        (lambda: feature_cross_correlation(torch.full((3, 4), math.nan), torch.ones(3, 4)), "NaN"),
    ],
)
def test_invalid_input_raises_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
