r"""Kernels K(x, y): (k, …) and (l, …) inputs, flattened, to a (k, l) matrix in float64.

Legend
    ℓ       length scale
    θ       angle between two inputs
    κ_0, κ_1    arc-cosine kernels of degree 0 and 1 (Cho and Saul, NeurIPS 2009), as functions of θ
    Σ, Θ    covariance of a layer's units, and tangent kernel, both divided by |x||y|

All are symmetric, positive semi-definite and deterministic. Inputs of any real type are cast to float64 first; the
result is on the device of ``x``, or on the CPU if that device has no float64. Each kernel raises a ValueError for
inputs that are empty, complex, or of different lengths. Inputs are tensors, NumPy arrays or nested lists.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stepwise_lightning.errors import UserError
from stepwise_lightning.precision import TensorLike, float64_pair

# Below this fraction of |x|² + |y|², a squared distance computed from products has lost half of its digits.
_CLOSE = 1e-8


def linear_kernel(x: TensorLike, y: TensorLike) -> Tensor:
    """Return ⟨x, y⟩, (k, l)."""
    x, y = _flattened(x, y)
    return x @ y.T


def rbf_kernel(x: TensorLike, y: TensorLike, length_scale: float = 1.0) -> Tensor:
    """Return exp(−|x − y|² / 2ℓ²), (k, l); ValueError if ``length_scale`` is not positive."""
    x, y = _flattened(x, y)
    return _squared_distances(x, y).mul_(-0.5 / _positive(length_scale) ** 2).exp_()


def laplace_kernel(x: TensorLike, y: TensorLike, length_scale: float = 1.0) -> Tensor:
    """Return exp(−|x − y| / ℓ), (k, l); ValueError if ``length_scale`` is not positive."""
    x, y = _flattened(x, y)
    return _squared_distances(x, y).sqrt_().mul_(-1 / _positive(length_scale)).exp_()


def relu_ntk(x: TensorLike, y: TensorLike, depth: int = 1) -> Tensor:
    """Return the neural tangent kernel of an infinitely wide ReLU network with ``depth`` hidden layers, (k, l).

    Source: Jacot et al., NeurIPS 2018, arXiv 1806.07572. No biases, NTK parametrisation, weights of unit variance,
    activations scaled to preserve |x|. With Θ_0 = cos θ_0,

        cos θ_{l+1} = κ_1(θ_l),  Θ_{l+1} = κ_1(θ_l) + Θ_l κ_0(θ_l),  K = |x||y| Θ_depth,
        κ_0 = (π − θ)/π,  κ_1 = (sin θ + (π − θ) cos θ)/π.

    For one hidden layer K = |x||y| [sin θ + 2 (π − θ) cos θ] / π. The recursion is in θ, because cos θ loses half of
    the digits for nearly parallel inputs.

    Raises:
        ValueError: ``depth`` below 1.

    """
    if depth < 1:
        raise UserError(f"depth must be at least 1 (hidden layers), got {depth}")
    x, y = _flattened(x, y)
    lengths = [z.norm(dim=1, keepdim=True) for z in (x, y)]
    u, v = (z / length.where(length > 0, 1.0) for z, length in zip((x, y), lengths, strict=True))
    theta = 2 * (_squared_distances(u, v).sqrt_() / 2).clamp_(max=1).asin_()
    tangent = theta.cos()
    for _ in range(depth):
        kappa0 = 1 - theta / math.pi
        # 1 − κ_1, without the cancellation of κ_1 against 1
        complement = 2 * (theta / 2).sin().square() - (theta.sin() - theta * theta.cos()) / math.pi
        tangent = 1 - complement + tangent * kappa0
        theta = 2 * (complement / 2).clamp(0, 1).sqrt_().asin_()
    return tangent * lengths[0] * lengths[1].T


def _flattened(x: TensorLike, y: TensorLike) -> tuple[Tensor, Tensor]:
    x, y = float64_pair(x, y, "inputs")
    if x.ndim < 2 or y.ndim < 2 or not x.numel() or not y.numel() or x[0].numel() != y[0].numel():
        raise UserError(
            "kernel inputs must be (k, …) and (l, …) with the same number of features and not empty, got "
            f"{tuple(x.shape)} and {tuple(y.shape)}"
        )
    return x.flatten(1), y.flatten(1)


def _positive(length_scale: float) -> float:
    if not 0 < length_scale < math.inf:
        raise UserError(f"length_scale must be positive and finite, got {length_scale}")
    return length_scale


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return |x − y|², (k, l), from products, and from differences where products would cancel."""
    norms = x.square().sum(1)[:, None], y.square().sum(1)[None]
    squared = torch.addmm(norms[0] + norms[1], x, y.T, alpha=-2)
    rows, columns = (squared <= _CLOSE * (norms[0] + norms[1])).nonzero(as_tuple=True)
    for part in torch.arange(len(rows), device=x.device).split(max(1, 2**20 // x.shape[1])):
        squared[rows[part], columns[part]] = (x[rows[part]] - y[columns[part]]).square().sum(1)
    return squared.clamp_(min=0)
