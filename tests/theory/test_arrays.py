"""NumPy arrays and nested lists equal tensors in all functions of theory."""

import numpy as np
import pytest
import torch
from torch import Tensor

from stepwise_lightning import theory

H1, H2 = torch.randn(2, 9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
START = H1[:2] / 100
FUNCTIONS = {
    "linear_kernel": theory.linear_kernel,
    "rbf_kernel": theory.rbf_kernel,
    "laplace_kernel": theory.laplace_kernel,
    "relu_ntk": theory.relu_ntk,
    "feature_cross_correlation": theory.feature_cross_correlation,
    "subspace_alignment": theory.subspace_alignment,
    "FeatureMoments": lambda a, b: theory.FeatureMoments.of(a, b).covariance,
    "growth_matrix": lambda a, b: theory.growth_matrix("vicreg", a, b, 2),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("convert", [Tensor.numpy, Tensor.tolist], ids=["array", "list"])
def test_arrays_and_lists_equal_tensors(name, convert):
    function = FUNCTIONS[name]
    expected = function(H1, H2)
    assert torch.equal(function(convert(H1), convert(H2)), expected)
    assert torch.equal(function(H1, convert(H2)), expected)


def test_arrays_in_linear_models_and_last_layers():
    gamma, times, drive = theory.feature_cross_correlation(H1, H2), torch.tensor([1.0, 2.0]), torch.tensor([0.1])
    for dtype in (torch.float64, torch.float32):
        model = theory.LinearBarlowTwins(gamma.to(dtype), START.to(dtype))
        same = theory.LinearBarlowTwins(gamma.to(dtype).numpy(), START.to(dtype).numpy())
        assert torch.equal(same.embedding_eigenvalues(times.numpy()), model.embedding_eigenvalues(times))
    assert torch.equal(theory.heavy_ball_growth(drive.numpy(), 0.5)[0], theory.heavy_ball_growth(drive, 0.5)[0])
    bias = H1[0, :2]
    results = [
        theory.LastLayer("simclr", f(H1), f(H2), f(START), f(bias)).simulate(
            f(torch.full((3,), 0.1)), velocity=[f(START), f(bias)]
        )
        for f in (Tensor.clone, Tensor.numpy, Tensor.tolist)
    ]
    for result in results[1:]:
        assert torch.equal(result.eigenvalues, results[0].eigenvalues)
        assert torch.equal(result.weight, results[0].weight) and torch.equal(result.bias, results[0].bias)


@pytest.mark.parametrize(
    "change", [lambda a: a[::-1], lambda a: a.astype(">f8"), lambda a: np.broadcast_to(a[0], a.shape)]
)
def test_reversed_big_endian_and_read_only_arrays(change):
    array = change(H1.numpy())
    expected = theory.linear_kernel(torch.tensor(np.array(array, dtype=float, order="C")), H2)
    assert torch.equal(theory.linear_kernel(array, H2), expected)


@pytest.mark.parametrize("wrong", ["rbf", None, [[1.0, 2.0], [3.0]], np.array([["a", "b"]])], ids=str)
def test_values_that_are_no_numbers_raise_one_line(wrong):
    for call in (
        lambda: theory.linear_kernel(wrong, H2),
        lambda: theory.feature_cross_correlation(wrong, H2),
        lambda: theory.subspace_alignment(H1, wrong),
        lambda: theory.LinearBarlowTwins(wrong, H2),
        lambda: theory.growth_matrix("vicreg", wrong, H2, 2),
        lambda: theory.EmpiricalNTK(torch.nn.Linear(4, 2))(wrong, H2),
        lambda: theory.ContrastiveKernelPCA(theory.rbf_kernel, 2).fit(wrong, H2),
    ):
        with pytest.raises(
            ValueError, match="must be a tensor, an array or rows of numbers of one length, got"
        ) as error:
            call()
        assert "\n" not in str(error.value)
