"""Kernels against their definitions, random wide networks, and each other."""

import math

import pytest
import torch

from stepwise_lightning.theory import laplace_kernel, linear_kernel, rbf_kernel, relu_ntk

KERNELS = {
    "linear": linear_kernel,
    "rbf": lambda x, y: rbf_kernel(x, y, 2.0),
    "laplace": lambda x, y: laplace_kernel(x, y, 3.0),
    "relu_ntk": relu_ntk,
    "deep_relu_ntk": lambda x, y: relu_ntk(x, y, depth=4),
}


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = torch.randn(12, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).split((7, 5))
    return x, y


def test_kernels_match_definitions():
    x, y = inputs()
    for i, a in enumerate(x.flatten(1)):
        for j, b in enumerate(y.flatten(1)):
            r = math.dist(a.tolist(), b.tolist())
            assert linear_kernel(x, y)[i, j].item() == pytest.approx(sum((a * b).tolist()), rel=1e-12)
            assert rbf_kernel(x, y, 2.0)[i, j].item() == pytest.approx(math.exp(-(r**2) / 8), rel=1e-12)
            assert laplace_kernel(x, y, 3.0)[i, j].item() == pytest.approx(math.exp(-r / 3), rel=1e-12)
            norms = a.norm() * b.norm()
            theta = torch.acos(a @ b / norms)
            wedge = (math.pi - theta) * theta.cos()
            expected = norms * (theta.sin() + 2 * wedge) / math.pi
            assert relu_ntk(x, y)[i, j].item() == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_kernels_are_positive_semidefinite_for_repeated_inputs(kernel):
    x, _ = inputs()
    x = torch.cat([x, x[:3], x[:2] * (1 + 1e-9), x[:1] + 1e-10])
    k = kernel(x, x)
    torch.testing.assert_close(k, k.T, rtol=0, atol=1e-14)
    assert torch.linalg.eigvalsh(k)[0] > -1e-13 * k.trace()
    torch.testing.assert_close(k[:3], k[7:10], rtol=1e-14, atol=1e-14)


def test_identical_large_inputs_have_zero_distance():
    x = 1e4 * inputs()[0]
    for kernel in (rbf_kernel, laplace_kernel):
        assert torch.equal(kernel(x, x.clone()).diagonal(), torch.ones(7, dtype=torch.float64))
    for depth in (1, 5):
        expected = (1 + depth) * x.flatten(1).square().sum(1)
        torch.testing.assert_close(relu_ntk(x, x, depth).diagonal(), expected, rtol=1e-14, atol=0)


def test_relu_ntk_is_accurate_for_nearly_parallel_inputs():
    """For one hidden layer, 1 − Θ/2 = θ/2π to first order in a small angle."""
    angle = 1e-7
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    y = torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    assert 2 - relu_ntk(x, y).item() == pytest.approx(angle / math.pi, rel=1e-6)


@pytest.mark.parametrize("depth", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_relu_ntk_matches_wide_random_networks(depth):
    """The mean over random networks in the NTK parametrisation of their tangent kernels."""
    generator = torch.Generator().manual_seed(depth)
    x, width, draws = torch.randn(6, 4, dtype=torch.float64, generator=generator), 1000, 12
    total = torch.zeros(6, 6, dtype=torch.float64)
    for _ in range(draws):
        sizes = [4] + [width] * depth + [1]
        weights = [
            torch.randn(b, a, dtype=torch.float64, generator=generator).requires_grad_()
            for a, b in zip(sizes[:-1], sizes[1:], strict=True)
        ]
        hidden = x @ weights[0].T
        for weight in weights[1:]:
            hidden = (2 / width) ** 0.5 * hidden.relu() @ weight.T
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(out, weights, retain_graph=True)]) for out in hidden
        ]
        gradients = torch.stack(rows)
        total += gradients @ gradients.T / draws
    exact = relu_ntk(x, x, depth)
    assert (total - exact).norm() < 0.03 * exact.norm()


def test_float32_is_cast_and_invalid_input_raises():
    x, y = inputs()
    for kernel in KERNELS.values():
        assert torch.equal(kernel(x.float(), y.float()), kernel(x.float().double(), y.float().double()))
        for wrong in (y[:, :1], y[:0], torch.zeros(4)):
            with pytest.raises(ValueError, match="same number of features and not empty, got"):
                kernel(x, wrong)
    for kernel in (rbf_kernel, laplace_kernel):
        with pytest.raises(ValueError, match="length_scale must be positive and finite, got 0"):
            kernel(x, y, 0)
    with pytest.raises(ValueError, match=r"depth must be at least 1 \(hidden layers\), got 0"):
        relu_ntk(x, y, depth=0)
    assert torch.equal(relu_ntk(torch.zeros(2, 3), torch.ones(1, 3)), torch.zeros(2, 1, dtype=torch.float64))
