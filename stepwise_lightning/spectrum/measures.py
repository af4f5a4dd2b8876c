"""Spectra of embeddings and measures of their rank: pure functions of tensors and arrays.

``rankme`` and ``embedding_eigenvalues`` take embeddings (n, d); ``effective_rank``, ``participation_ratio`` and
``alpha_req`` take their eigenvalues: ``effective_rank(embedding_eigenvalues(features))`` is the rank of features.

All inputs are cast to float64: a float32 covariance hides modes below 1e-8 of the largest. Computations run on the
device of the embeddings, or on the CPU if the device has no float64. Complex inputs raise a ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stepwise_lightning.errors import UserError
from stepwise_lightning.precision import TensorLike, as_float64, as_tensor, check_finite
from stepwise_lightning.spectrum.matrices import TABLE


def embedding_eigenvalues(z: TensorLike, center: bool = True) -> Tensor:
    """Return the eigenvalues of the embeddings' covariance (1/n) Σ_i z_i z_iᵀ, descending.

    Args:
        z: embeddings, (n, d), any real type; cast to float64 first.
        center: subtract the mean embedding first, which limits the number of non-zero eigenvalues to n − 1.

    Returns:
        (d,) float64, ≥ 0, accurate to about 1e-15 of the largest. For d > n the n × n Gram matrix is used.

    Example:
        >>> import torch
        >>> from stepwise_lightning.spectrum import effective_rank, embedding_eigenvalues
        >>> z = torch.tensor([[2.0, 1.0], [-2.0, 1.0], [2.0, -1.0], [-2.0, -1.0]])
        >>> embedding_eigenvalues(z)
        tensor([4., 1.], dtype=torch.float64)
        >>> round(float(effective_rank(embedding_eigenvalues(z))), 2)
        1.65

    Raises:
        ValueError: ``z`` is not a non-empty, finite matrix.

    """
    x = _matrix(z)
    if center:
        x = x - x.mean(0)
    n, d = x.shape
    smaller = x.T @ x if d <= n else x @ x.T
    eigenvalues = torch.linalg.eigvalsh(smaller / n).flip(0).clamp(min=0)
    return torch.nn.functional.pad(eigenvalues, (0, d - len(eigenvalues)))


def cross_correlation_eigenvalues(z1: TensorLike, z2: TensorLike, center: bool = False) -> Tensor:
    """Return the eigenvalues of C = (z1ᵀz2 + z2ᵀz1)/2n, descending; they may be negative.

    Args:
        z1: embeddings of the first views, (n, d), any real type; cast to float64 first.
        z2: embeddings of the second views, (n, d).
        center: subtract each view's mean embedding first.

    Returns:
        (d,) float64. For d > 2n a 2n × 2n matrix is used, and d − 2n eigenvalues are zero.

    Raises:
        ValueError: the views differ in shape or device, or are not non-empty, finite matrices.

    """
    x1, x2 = as_tensor(z1, "the embeddings"), as_tensor(z2, "the embeddings")
    if x1.shape != x2.shape:
        raise UserError(f"both views must have the same shape, got {tuple(x1.shape)} and {tuple(x2.shape)}")
    _check_devices([x1, x2])
    x1, x2 = _matrix(x1), _matrix(x2)
    if center:
        x1, x2 = x1 - x1.mean(0), x2 - x2.mean(0)
    n, d = x1.shape
    if d > 2 * n:  # with [z1; z2]ᵀ = Q R and P the swap of the views, C = Q (R P Rᵀ/2n) Qᵀ
        r = torch.linalg.qr(torch.cat([x1, x2]).T, mode="r").R
        x1, x2 = r[:, :n].T, r[:, n:].T
    c = x1.T @ x2 / n
    eigenvalues = torch.linalg.eigvalsh((c + c.T) / 2).flip(0)
    zeros = eigenvalues.new_zeros(d - len(eigenvalues))
    return torch.cat([eigenvalues, zeros]).sort(descending=True).values


def effective_rank(eigenvalues: TensorLike) -> Tensor:
    """Return the effective rank exp(H(p)), with H the entropy of p_k = λ_k / Σλ; between 1 and d.

    Roy and Vetterli, *The effective rank*, EUSIPCO 2007, normalise singular values; here p contains eigenvalues of a
    covariance. Negative eigenvalues count as zero; an all-zero spectrum has rank 0. Shape (…, d) -> (…).

    Raises:
        ValueError: values that are not finite, or several rows that are not sorted, such as features (n, d).

    """
    p = _weights(eigenvalues)
    return torch.where(p.sum(-1) > 0, torch.special.entr(p).sum(-1).exp(), 0.0)


def participation_ratio(eigenvalues: TensorLike) -> Tensor:
    """Return the participation ratio (Σλ)² / Σλ²: the number of modes that share the variance, between 1 and d.

    Gao et al., *A theory of multineuronal dimensionality*, bioRxiv 214262, 2017. Negative eigenvalues count as zero; an
    all-zero spectrum has ratio 0. Shape (…, d) -> (…).

    Raises:
        ValueError: see :func:`effective_rank`.

    """
    p = _weights(eigenvalues)
    return torch.where(p.sum(-1) > 0, 1 / p.square().sum(-1), 0.0)


def alpha_req(eigenvalues: TensorLike) -> Tensor:
    """Return the exponent α of the power law λ_k ∝ k^{−α}: minus the least-squares slope of log λ_k against log k.

    Agrawal et al., *α-ReQ*, NeurIPS 2022, fit a middle range of ranks; here all eigenvalues above 1e-12 of the largest
    have equal weight. NaN if fewer than two remain. Shape (…, d) -> (…).

    Raises:
        ValueError: see :func:`effective_rank`.

    """
    values = _spectrum(eigenvalues).sort(dim=-1, descending=True).values
    kept = values > 1e-12 * values[..., :1].clamp(min=0)
    count = kept.sum(-1)
    x = torch.arange(1, values.shape[-1] + 1).to(values).log().expand_as(values) * kept
    y = torch.where(kept, values, 1.0).log()
    x_centred = (x - (x.sum(-1) / count)[..., None]) * kept
    slope = (x_centred * y).sum(-1) / x_centred.square().sum(-1)
    return torch.where(count >= 2, -slope, math.nan)


def rankme(z: TensorLike) -> Tensor:
    """Return RankMe: exp(−Σ p_k log p_k) with p_k = σ_k / Σσ + 1e-7 and σ the singular values of embeddings (n, d).

    Garrido et al., ICML 2023, including the 1e-7; without centring. At most min(n, d) + 1e-5.

    Raises:
        ValueError: ``z`` is not a non-empty, finite matrix.

    """
    x = _matrix(z)
    sigma = torch.linalg.svdvals(x if len(x) >= x.shape[1] else x.T)  # tall matrices are up to four times faster
    if sigma[0] == 0:
        return torch.zeros_like(sigma[0])
    return torch.special.entr(sigma / sigma.sum() + 1e-7).sum().exp()


def measure(matrix: str, views: Sequence[TensorLike], center: bool = False) -> tuple[Tensor, dict[str, float]]:
    """Return the eigenvalues of a matrix, (d,), and its rank measures by name.

    Args:
        matrix: a name in ``MATRICES``.
        views: embeddings, (n, d) each; ``cross_correlation`` needs two views.
        center: subtract the means before the cross-correlation is formed; covariances are always centred.

    Raises:
        ValueError: invalid embeddings, or views on different devices.

    """
    tensors = [as_tensor(z, "the embeddings") for z in views]
    _check_devices(tensors)
    tensors = [as_float64(z, "the embeddings") for z in tensors]
    if matrix == "cross_correlation":
        eigenvalues = cross_correlation_eigenvalues(tensors[0], tensors[1], center=center)
    else:
        z = TABLE[matrix].transform(_matrix(torch.cat(tensors)), None)
        eigenvalues = embedding_eigenvalues(z)
    eigenvalues = eigenvalues.cpu()
    measures = {
        "effective_rank": float(effective_rank(eigenvalues)),
        "participation_ratio": float(participation_ratio(eigenvalues)),
        "alpha_req": float(alpha_req(eigenvalues)),
    }
    if matrix != "cross_correlation":  # RankMe is a property of the embeddings
        measures["rankme"] = float(rankme(z))
    return eigenvalues, measures


def tangent_coordinates(z: TensorLike) -> Tensor:
    """Return û − (û·m̂) m̂ with û = z/‖z‖: normalised embeddings without their component along the mean, (n, d).

    Embeddings that spread from one point into k directions lie on a k-dimensional sphere after normalisation, which
    spans k + 1 dimensions: their covariance has k + 1 non-zero eigenvalues. Without the mean direction, which lies in
    the same dimensions, k non-zero eigenvalues remain, one per mode.

    Args:
        z: embeddings, (n, d), any real type; cast to float64.

    Raises:
        ValueError: ``z`` is not a non-empty, finite matrix.

    """
    return TABLE["tangent_covariance"].transform(_matrix(z), None)


def _matrix(z: TensorLike) -> Tensor:
    x = as_tensor(z, "the embeddings")
    if x.ndim != 2 or x.numel() == 0:
        raise UserError(f"embeddings must have shape (samples, dimensions) and not be empty, got {tuple(x.shape)}")
    x = as_float64(x.detach(), "the embeddings")
    if not x.isfinite().all():
        raise UserError("the embeddings contain NaN or infinite values: lower the learning rate, or check the input")
    return x


def _spectrum(eigenvalues: TensorLike) -> Tensor:
    """Return eigenvalues (…, d) in float64, checked; one row may have any order, several must be sorted."""
    values = as_float64(eigenvalues, "the eigenvalues")
    check_finite(values, "the eigenvalues")
    steps = values.diff(dim=-1) if values.ndim else values
    if values.ndim == 0 or not (values.ndim == 1 or (steps <= 0).all() or (steps >= 0).all()):
        rows = "a number" if values.ndim == 0 else f"unsorted rows of shape {tuple(values.shape)}"
        raise UserError(
            f"expected eigenvalues (…, d), sorted in each row, got {rows}: for features (n, d) pass "
            "embedding_eigenvalues(features)"
        )
    return values


def _check_devices(views: Sequence[Tensor]) -> None:
    devices = list(dict.fromkeys(str(z.device) for z in views))
    if len(devices) > 1:
        raise UserError(f"the views must be on one device, got {' and '.join(devices)}: move one")


def _weights(eigenvalues: TensorLike) -> Tensor:
    values = _spectrum(eigenvalues).clamp(min=0)
    total = values.sum(-1, keepdim=True)
    return torch.where(total > 0, values / total, 0.0)
