"""Losses as pure functions of the embeddings z1, z2 of two views, (n, d) each, without distributed code.

Each loss is a sum of weighted terms, returned by ``<name>_terms``. The defaults of the losses are the constants below,
shared with the LightningModules; the terms have no defaults. :data:`LOSSES` is the table of losses.

Losses are computed in float64 if a view is float64, else in float32, also for half precision and under
``torch.autocast``. Gradients have the type of the embeddings.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from stepwise_lightning.errors import UserError
from stepwise_lightning.precision import as_float64, in_full_precision

OFF_DIAGONAL_WEIGHT = 0.0051
BARLOW_TWINS_EPS = 1e-5
TEMPERATURE = 0.5
# Below it SimCLR is computed in float64: its two terms grow as 1/τ, and the loss is their small difference.
_FLOAT64_TEMPERATURE = 0.05
INVARIANCE_WEIGHT, VARIANCE_WEIGHT, COVARIANCE_WEIGHT = 25.0, 25.0, 1.0
VICREG_EPS = 1e-4


def sum_terms(terms: Mapping[str, Tensor]) -> Tensor:
    """Return the loss: the sum of the scalars in ``terms``."""
    return reduce(torch.add, terms.values())


def barlow_twins_loss(
    z1: Tensor,
    z2: Tensor,
    off_diagonal_weight: float = OFF_DIAGONAL_WEIGHT,
    normalize: bool = True,
    center: bool = False,
    eps: float = BARLOW_TWINS_EPS,
) -> Tensor:
    """Return Σ_i (C_ii − 1)² + off_diagonal_weight · Σ_{i≠j} C_ij² for a cross-correlation C (d, d) of the views.

    Args:
        z1: embeddings of the first views, (n, d).
        z2: embeddings of the second views, (n, d).
        off_diagonal_weight: the published λ.
        normalize: True for the published loss (Zbontar et al., ICML 2021): C = ẑ1ᵀẑ2 / n, where ẑ is z
            batch-normalised with the biased variance. False for the analytical model of Simon et al.
            (arXiv 2303.15438): C = (z1ᵀz2 + z2ᵀz1) / 2n; with weight 1 the loss is ‖C − I‖²_F.
        center: with ``normalize=False``, subtract the mean of each view first (the paper does not).
        eps: with ``normalize=True``, added to the variance under the root.

    Returns:
        A scalar, float64 if a view is, else float32.

    Example:
        >>> import torch
        >>> from stepwise_lightning import barlow_twins_loss
        >>> z = torch.eye(3) * 3**0.5  # C is the identity
        >>> float(barlow_twins_loss(z, z, off_diagonal_weight=1, normalize=False))
        0.0

    Raises:
        ValueError: views of different shapes or devices, not (n, d), empty, or not of a real floating type; one pair
            if means are subtracted.

    """
    return sum_terms(barlow_twins_terms(z1, z2, off_diagonal_weight, normalize, center, eps))


@in_full_precision
def barlow_twins_terms(
    z1: Tensor, z2: Tensor, off_diagonal_weight: float, normalize: bool, center: bool, eps: float
) -> dict[str, Tensor]:
    """Return the terms of :func:`barlow_twins_loss`, ``on_diagonal`` and ``off_diagonal``."""
    if normalize or center:
        z1, z2 = _checked_views(z1, z2, 2, "a centred Barlow Twins loss")
        z1, z2 = z1 - z1.mean(0), z2 - z2.mean(0)
    else:
        z1, z2 = _checked_views(z1, z2)
    if normalize:
        z1 = z1 * (z1.square().mean(0) + eps).rsqrt()
        z2 = z2 * (z2.square().mean(0) + eps).rsqrt()
    c = z1.T @ z2
    c = c / len(z1) if normalize else (c + c.T) / (2 * len(z1))
    return {
        "on_diagonal": (c.diagonal() - 1).square().sum(),
        "off_diagonal": off_diagonal_weight * _off_diagonal(c).square().sum(),
    }


def simclr_loss(z1: Tensor, z2: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Return NT-Xent, the mean over the 2n views of −log(exp(s_ij/τ) / Σ_{k≠i} exp(s_ik/τ)).

    j is the other view of sample i, k runs over all other views, and s is the cosine similarity (Chen et al.,
    ICML 2020). The loss is never negative.

    Args:
        z1: embeddings of the first views, (n, d).
        z2: embeddings of the second views, (n, d).
        temperature: τ > 0.

    Returns:
        A scalar, float64 if a view is, else float32; below τ = 0.05 it is computed in float64.

    Raises:
        ValueError: views of different shapes or devices, not (n, d), empty, or not of a real floating type; fewer than
            2 pairs; τ ≤ 0.

    """
    dtype = torch.float64 if torch.float64 in (z1.dtype, z2.dtype) else torch.float32
    return sum_terms(simclr_terms(z1, z2, temperature)).to(dtype)


@in_full_precision
def simclr_terms(z1: Tensor, z2: Tensor, temperature: float) -> dict[str, Tensor]:
    """Return the terms of :func:`simclr_loss`: ``alignment``, mean −s_ij/τ, and ``uniformity``, mean log Σ_k exp.

    Below τ = 0.05 they are float64: each is of order 1/τ, and float32 would round their sum to multiples of 0.008 at
    τ = 10⁻⁵.
    """
    z1, z2 = _checked_views(z1, z2, 2, "SimCLR (one pair has no negatives)")
    if not temperature > 0:
        raise UserError(f"the temperature must be above 0, got {temperature}")
    z = torch.cat([z1, z2])
    z = F.normalize(as_float64(z) if temperature < _FLOAT64_TEMPERATURE else z, dim=1)
    similarities = z @ z.T / temperature
    # Rows i and i + n are the views of one sample.
    positives = similarities.diagonal(len(z1))
    identity = torch.eye(len(z), dtype=torch.bool, device=z.device)
    alignment = -positives.mean()
    uniformity = similarities.masked_fill(identity, -torch.inf).logsumexp(1).mean()
    # Round-off can make the sum of two cancelling means negative; gradients are not changed.
    excess = (uniformity + alignment).detach().clamp(max=0)
    return {"alignment": alignment, "uniformity": uniformity - excess}


def vicreg_loss(
    z1: Tensor,
    z2: Tensor,
    invariance_weight: float = INVARIANCE_WEIGHT,
    variance_weight: float = VARIANCE_WEIGHT,
    covariance_weight: float = COVARIANCE_WEIGHT,
    eps: float = VICREG_EPS,
) -> Tensor:
    """Return the weighted sum of invariance, variance and covariance of VICReg, as in the authors' code.

    - invariance: the mean of (z1 − z2)² over samples and dimensions;
    - variance: (v(z1) + v(z2)) / 2, where v is the mean over dimensions of max(0, 1 − √(variance + eps));
    - covariance: c(z1) + c(z2), where c is the sum of the squared off-diagonal covariances, over d.

    Variances and covariances are unbiased, with 1/(n − 1). Source: Bardes, Ponce and LeCun, ICLR 2022, and
    ``facebookresearch/vicreg``; the factor ½ of the variance term is in the code, not in the formula of the paper.

    Args:
        z1: embeddings of the first views, (n, d).
        z2: embeddings of the second views, (n, d).
        invariance_weight: the published λ.
        variance_weight: the published μ.
        covariance_weight: the published ν.
        eps: added to the variance under the root; bounds the gradient at zero variance.

    Returns:
        A scalar, float64 if a view is, else float32.

    Raises:
        ValueError: views of different shapes or devices, not (n, d), empty, or not of a real floating type; fewer than
            2 pairs.

    """
    return sum_terms(vicreg_terms(z1, z2, invariance_weight, variance_weight, covariance_weight, eps))


@in_full_precision
def vicreg_terms(
    z1: Tensor, z2: Tensor, invariance_weight: float, variance_weight: float, covariance_weight: float, eps: float
) -> dict[str, Tensor]:
    """Return the terms of :func:`vicreg_loss`, ``invariance``, ``variance`` and ``covariance``."""
    z1, z2 = _checked_views(z1, z2, 2, "VICReg")
    covariances = [centred.T @ centred / (len(centred) - 1) for centred in (z1 - z1.mean(0), z2 - z2.mean(0))]
    hinges = [F.relu(1 - (c.diagonal() + eps).sqrt()).mean() for c in covariances]
    squares = [_off_diagonal(c).square().sum() / len(c) for c in covariances]
    return {
        "invariance": invariance_weight * (z1 - z2).square().mean(),
        "variance": variance_weight * (hinges[0] + hinges[1]) / 2,
        "covariance": covariance_weight * (squares[0] + squares[1]),
    }


def spectral_contrastive_loss(z1: Tensor, z2: Tensor) -> Tensor:
    """Return −2 times the mean of z1_i · z2_i, plus the mean of (z1_i · z2_j)² over i ≠ j.

    Its minimum approximates the leading eigenfunctions of the graph of positive pairs (HaoChen et al., NeurIPS 2021,
    arXiv 2106.04156). From a small start modes grow as in the analytical Barlow Twins loss, with 4 Γ.

    Args:
        z1: embeddings of the first views, (n, d).
        z2: embeddings of the second views, (n, d).

    Returns:
        A scalar, float64 if a view is, else float32.

    Raises:
        ValueError: views of different shapes or devices, not (n, d), empty, or not of a real floating type; fewer than
            2 pairs.

    """
    return sum_terms(spectral_contrastive_terms(z1, z2))


@in_full_precision
def spectral_contrastive_terms(z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
    """Return the terms of :func:`spectral_contrastive_loss`, ``alignment`` and ``repulsion``."""
    z1, z2 = _checked_views(z1, z2, 2, "the spectral contrastive loss")
    products = z1 @ z2.T
    repulsion = _off_diagonal(products).square().sum() / (len(z1) * (len(z1) - 1))
    return {"alignment": -2 * products.diagonal().mean(), "repulsion": repulsion}


@dataclass(frozen=True)
class Loss:
    """Name, title, function and properties of a loss."""

    name: str  #: name in configurations and in the arguments of the theory
    title: str  #: name in figures and tables
    function: Callable[..., Tensor]  #: ``function(z1, z2, **settings)`` returns a scalar
    driven_matrix: str  #: the matrix of ``stepwise_lightning.spectrum.MATRICES`` whose eigenvalues the loss drives
    scale_invariant: bool = False  #: True if the loss does not depend on the length of the embeddings
    #: True if gradients of a last layer are computed from moments of the features, for all batches at once
    uses_moments: bool = True


LOSSES = {
    loss.name: loss
    for loss in (
        Loss("barlow_twins", "Barlow Twins", barlow_twins_loss, "cross_correlation"),
        Loss("vicreg", "VICReg", vicreg_loss, "covariance"),
        # In the covariance of normalised embeddings the arc of the first mode has two eigenvalues; here it has one.
        Loss("simclr", "SimCLR", simclr_loss, "tangent_covariance", scale_invariant=True, uses_moments=False),
        Loss("spectral_contrastive", "Spectral contrastive", spectral_contrastive_loss, "cross_correlation"),
    )
}


def loss_settings(loss: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings of a loss: its defaults, updated with ``settings``.

    Raises:
        ValueError: an unknown loss, a setting that the loss does not have, or a value out of range.

    """
    if loss not in LOSSES:
        raise UserError(f"loss must be one of {', '.join(map(repr, LOSSES))}, got {loss!r}")
    parameters = list(inspect.signature(LOSSES[loss].function).parameters.values())[2:]
    defaults = {parameter.name: parameter.default for parameter in parameters}
    if unknown := sorted(settings.keys() - defaults.keys()):
        raise UserError(f"{loss} has no setting {', '.join(unknown)}; it has {', '.join(defaults)}")
    for name, value in settings.items():
        if isinstance(defaults[name], bool):
            if value not in (True, False):
                raise UserError(f"{name} of {loss} must be true or false, got {value!r}")
        elif isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < math.inf:
            raise UserError(f"{name} of {loss} must be a number, at least 0 and finite, got {value!r}")
    return defaults | dict(settings)


def _off_diagonal(matrix: Tensor) -> Tensor:
    return matrix - matrix.diagonal().diag_embed()


def _checked_views(z1: Tensor, z2: Tensor, min_samples: int = 1, loss: str = "this loss") -> tuple[Tensor, Tensor]:
    """Return both views in the wider of their types."""
    if z1.shape != z2.shape or z1.ndim != 2 or z1.numel() == 0:
        raise UserError(
            f"the two views' embeddings must have one shape (samples, dimensions), not empty, "
            f"got {tuple(z1.shape)} and {tuple(z2.shape)}"
        )
    if not z1.is_floating_point() or not z2.is_floating_point():
        raise UserError(
            f"a loss needs embeddings of a real floating type, which have gradients, got {z1.dtype} and {z2.dtype}: "
            "convert integers with float(), and split complex numbers with torch.view_as_real"
        )
    if z1.device != z2.device:
        raise UserError(f"the two views' embeddings must be on one device, got {z1.device} and {z2.device}: move one")
    if len(z1) < min_samples:
        raise UserError(f"{loss} needs at least {min_samples} pairs in a batch, got {len(z1)}: raise the batch size")
    dtype = torch.promote_types(z1.dtype, z2.dtype)
    return z1.to(dtype), z2.to(dtype)
