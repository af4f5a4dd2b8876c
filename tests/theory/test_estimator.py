"""Representations and named parameters of the estimators."""

from functools import partial

import pytest
import torch
from torch import nn

from stepwise_lightning.theory import (
    ContrastiveKernelPCA,
    EmpiricalNTK,
    LastLayer,
    LinearBarlowTwins,
    linear_kernel,
    rbf_kernel,
)


def test_repr_shows_arguments_and_fitted_state():
    model = ContrastiveKernelPCA(partial(rbf_kernel, length_scale=2.0), n_components=2)
    assert repr(model) == "ContrastiveKernelPCA(kernel=rbf_kernel(length_scale=2.0), n_components=2, not fitted)"
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    model.fit(x, x)
    assert repr(model) == "ContrastiveKernelPCA(kernel=rbf_kernel(length_scale=2.0), n_components=2, fitted on 7 pairs)"
    assert repr(EmpiricalNTK(nn.Linear(3, 2), "last")) == "EmpiricalNTK(Linear, parameters=last)"
    assert repr(EmpiricalNTK(nn.Linear(3, 2), ["weight"])) == "EmpiricalNTK(Linear, parameters=1 named)"


def test_repr_of_linear_models_shows_shapes():
    x = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0))
    assert repr(LinearBarlowTwins(torch.eye(3), x[0, :2], 0.01)) == (
        "LinearBarlowTwins(gamma=(3, 3), weights0=(2, 3), learning_rate=0.01)"
    )
    assert (
        repr(LastLayer("vicreg", *x, x[0, :2])) == "LastLayer('vicreg', features=(1, 7, 3), weight=(2, 3), bias=False)"
    )


def test_step_times_are_an_attribute_of_linear_and_kernel_trajectories():
    x = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0))
    model, start = ContrastiveKernelPCA(linear_kernel, 2).fit(*x), torch.full((2,), 1e-3)
    trajectory = model.trajectory(start)
    assert isinstance(trajectory, LinearBarlowTwins)
    assert torch.equal(trajectory.step_times, model.step_times(start))


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        (ContrastiveKernelPCA(rbf_kernel, 2, tolerance=1e-6, progress=False), {"n_components": 3, "max_bytes": 2**20}),
        (EmpiricalNTK(nn.Linear(3, 2), "last"), {"parameters": ("weight",), "dtype": torch.float32}),
    ],
    ids=["ContrastiveKernelPCA", "EmpiricalNTK"],
)
def test_parameters_are_read_and_set_by_name(model, changes):
    before = model.get_params(deep=False)
    copy = type(model)(**before)
    assert copy.get_params() == before
    assert copy.set_params(**changes) is copy and copy.get_params() == before | changes
    with pytest.raises(ValueError, match=r"has no nonsense; choose from: "):
        copy.set_params(nonsense=1)
    assert copy.get_params() == before | changes


def test_set_params_with_invalid_value_changes_nothing():
    model = ContrastiveKernelPCA(rbf_kernel, 2)
    with pytest.raises(ValueError, match="tolerance must lie between 0 and 1"):
        model.set_params(n_components=5, tolerance=2.0)
    assert model.n_components == 2
