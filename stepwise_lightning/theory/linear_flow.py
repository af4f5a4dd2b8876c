"""Growth rates and modes of a last layer from a small start, for any loss.

Legend in :mod:`stepwise_lightning.theory.loss_signature`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepwise_lightning.errors import UserError
from stepwise_lightning.precision import TensorLike, as_float64, float64_pair
from stepwise_lightning.theory.loss_derivatives import TOLERANCE, PairLoss
from stepwise_lightning.theory.loss_signature import LossSignature, loss_signature
from stepwise_lightning.theory.moments import validated_features

_DENSE = 600  # number of weights up to which all eigenpairs are computed
_ROUND_OFF = 1e-12  # relative


class GrowthModes(NamedTuple):
    """Fastest modes of a last layer; see :func:`growth_modes`."""

    rates: Tensor
    """ρ, (k,), by descending real part; complex if the map is not symmetric and a rate is not real."""
    directions: Tensor
    """W of each mode, (k, d, m), of norm one."""


def growth_modes(
    loss: str | PairLoss, h1: TensorLike, h2: TensorLike, dim: int, num_modes: int, bias: TensorLike | None = None
) -> GrowthModes:
    r"""Return the fastest modes of the gradient flow of a last linear layer z = W h + b while W is small.

    A mode grows as e^{ρt}. For an isotropic loss each eigenvector v of H grows at the same rate in all directions of
    the embedding: it is returned once, as W = u vᵀ with unit vectors u that are orthogonal to each other (for up to d
    modes) and to a bias along which nothing grows. For another loss the modes are eigenvectors of the whole map from W
    to dW/dt, in which each v may occur up to d times.

    Two towers, with a layer for each view, are one layer on features of both:
    :func:`stepwise_lightning.theory.two_tower_features`.

    Args:
        loss: as in :func:`loss_signature`.
        h1: features of the first views, (n, m), or in batches, (batches, n, m); n defines the batch size of the loss.
        h2: features of the second views.
        dim: d.
        num_modes: k; for an isotropic loss at most m, else at most d m.
        bias: b, (d,), None for 0.

    Returns:
        Rates (k,) and directions (k, d, m) on the CPU, float64, or complex128 for a loss with a stop-gradient and
        oscillating modes.

    Raises:
        ValueError: as :func:`loss_signature`; a loss that depends on the order of the pairs, or whose gradient does not
            vanish at equal embeddings.

    """
    h1, h2 = (h.cpu() for h in validated_features(h1, h2))
    signature = checked_signature(loss, dim, h1.shape[1], bias)
    largest = h1.shape[2] * (1 if signature.isotropic else dim)
    if not 1 <= num_modes <= largest:
        raise UserError(f"num_modes must lie between 1 and {largest}, got {num_modes}")
    moments = FlowMoments.of(h1, h2)
    scale = float(signature.alpha.norm() + signature.beta.norm()) * float(torch.cat([h1, h2]).square().sum(2).mean())
    if not signature.isotropic:
        rates, vectors = _eigenpairs(signature, moments, num_modes)
        return GrowthModes(without_round_off(rates, scale), vectors.T.reshape(num_modes, dim, -1))
    rates, vectors = _top(isotropic_growth_matrix(signature, h1, h2), signature.is_gradient, num_modes)
    rates = without_round_off(rates, scale)
    units = torch.eye(dim).to(h1)
    if signature.normal is not None:
        units = torch.linalg.qr(torch.cat([signature.normal[:, None], units], 1)).Q[:, 1:].T
    units = torch.stack([units[mode % len(units)] for mode in range(num_modes)])
    return GrowthModes(rates, units[:, :, None] * vectors.T[:, None])


def checked_signature(loss: str | PairLoss, dim: int, num_pairs: int, bias: TensorLike | None) -> LossSignature:
    """Return the signature of a loss that has growth rates; raise a UserError for another loss."""
    signature = loss_signature(loss, dim, num_pairs, bias)
    if not signature.permutation_invariant:
        raise UserError(
            "the loss depends on the order of the pairs, and so do its growth rates: remove queues and the structure "
            "within a batch"
        )
    drive = float(signature.gradient.norm())
    scale = 1.0 if bias is None else float(as_float64(bias).norm()) or 1.0
    curvature = float(signature.alpha.norm() + signature.beta.norm())
    if drive > TOLERANCE * curvature * scale:
        raise UserError(
            f"the gradient at equal embeddings must vanish, or the mean embedding moves before modes grow, got norm "
            f"{drive:.3g}: choose another bias (None for 0)"
        )
    return signature


def start_signature(
    loss: str | PairLoss, dim: int, num_pairs: int, bias: Tensor | None
) -> tuple[LossSignature, Tensor | None]:
    """Return the signature of a loss at b = 0, or at a bias if the loss has none there, and this point b.

    At b = 0 a bias is the weight of an additional constant feature.
    """
    try:
        return checked_signature(loss, dim, num_pairs, None), None
    except UserError:
        if bias is None or not bias.any():
            raise
    return checked_signature(loss, dim, num_pairs, bias), bias


def isotropic_growth_matrix(signature: LossSignature, h1: Tensor, h2: Tensor) -> Tensor:
    """Return H for validated features (batches, n, m), of an anisotropic loss for its mean α and β."""
    moments = FlowMoments.of(h1, h2)
    alpha, beta = (coefficients.to(h1.device) for coefficients in (signature.alpha, signature.beta))
    total = alpha + beta
    growth = -torch.einsum("ac,acmk->mk", alpha, moments.centred) - torch.einsum("ac,acmk->mk", total, moments.means)
    return (growth + growth.T) / 2 if signature.is_gradient else growth


def without_round_off(rates: Tensor, scale: float) -> Tensor:
    """Return growth rates, zero instead of the round-off of a matrix of norm ``scale``."""
    return torch.where(rates.abs() > _ROUND_OFF * scale, rates, 0.0)


def two_tower_features(h1: TensorLike, h2: TensorLike) -> tuple[Tensor, Tensor]:
    """Return features on which one layer equals two towers, with a layer for each view: [h1, 0] and [0, h2].

    The layer is [W_1, W_2], of shape (d, m_1 + m_2), as in CLIP and SigLIP; both biases are equal. Its growth
    matrix and modes are the joint ones of both layers.

    Args:
        h1: inputs of the first layer, (…, n, m_1).
        h2: inputs of the second layer, (…, n, m_2).

    Returns:
        Two tensors (…, n, m_1 + m_2), float64.

    """
    h1, h2 = float64_pair(h1, h2, "features")
    if h1.ndim < 2 or h1.shape[:-1] != h2.shape[:-1]:
        raise UserError(f"both towers need features of the same pairs, got {tuple(h1.shape)} and {tuple(h2.shape)}")
    return torch.nn.functional.pad(h1, (0, h2.shape[-1])), torch.nn.functional.pad(h2, (h1.shape[-1], 0))


class FlowMoments(NamedTuple):
    """Moments of features that enter dW/dt, (2, 2, m, m) each, with indices a, c: means over batches."""

    centred: Tensor  #: M_ca − m_c m_aᵀ
    means: Tensor  #: m_c m_aᵀ

    @classmethod
    def of(cls, h1: Tensor, h2: Tensor) -> FlowMoments:
        """Return the moments of validated features (batches, n, m)."""
        h = torch.stack([h1, h2])
        means = h.mean(2)
        centred = (h - means[:, :, None]).flatten(1, 2)
        return cls(
            torch.einsum("cim,aik->acmk", centred, centred) / centred.shape[1],
            torch.einsum("cbm,abk->acmk", means, means) / means.shape[1],
        )


def _eigenpairs(signature: LossSignature, moments: FlowMoments, count: int) -> tuple[Tensor, Tensor]:
    """Return the top eigenvalues (k,) and eigenvectors (d m, k) of the map from W to dW/dt."""
    a, total = (x.permute(0, 2, 1, 3) for x in (signature.a, signature.a + signature.b))
    d, m = a.shape[-1], moments.means.shape[-1]
    if d * m <= _DENSE or count > d * m - 3:
        blocks, pairs = torch.stack([a, total]), torch.stack([moments.centred, moments.means])
        matrix = -torch.einsum("xacde,xacmk->dkem", blocks, pairs).reshape(d * m, d * m)
        return _top(matrix, signature.is_gradient, count)

    def flow(vector: Any) -> Any:
        w = torch.as_tensor(vector).reshape(d, m)
        terms = ((a @ w) @ moments.centred + (total @ w) @ moments.means).sum((0, 1))
        return -terms.flatten().numpy()

    # It takes a second to import.
    from scipy.sparse.linalg import LinearOperator, eigs, eigsh

    operator = LinearOperator((d * m, d * m), matvec=flow, dtype=float)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(d * m, generator=generator, dtype=torch.float64, device="cpu").numpy()
    solver, order = (eigsh, "LA") if signature.is_gradient else (eigs, "LR")
    values, vectors = solver(operator, count, which=order, v0=start, tol=1e-12)
    return _sorted(torch.from_numpy(values), torch.from_numpy(vectors), count)


def _top(matrix: Tensor, symmetric: bool, count: int) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix) if symmetric else torch.linalg.eig(matrix)
    return _sorted(values, vectors, count)


def _sorted(values: Tensor, vectors: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the eigenpairs of largest real part, real if all eigenvalues are."""
    order = values.real.argsort(descending=True)[:count]
    values, vectors = values[order], vectors[:, order]
    if values.is_complex() and not (values.imag.abs() > TOLERANCE * values.abs().max()).any():
        phases = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        return values.real, (vectors * (phases.conj() / phases.abs())).real
    return values, vectors
