r"""Early dynamics of any joint-embedding loss, from its second derivatives at equal embeddings.

A loss L(z1, z2) that is invariant under permutations of the pairs has only two kinds of second derivatives at the point
z1_i = z2_i = b, at which all samples are equal:

    ∂²L/∂z^a_i ∂z^c_j = δ_ij A_ac / n + B_ac / n²

A and B, the signature of the loss, depend on the loss, n, d and b, not on the data. To first order in W, gradient flow
of a last linear layer is

    dW/dt = −Σ_ac (A_ac W M_ca + B_ac W m_c m_aᵀ)

Legend
    n, d        number of pairs; dimension of the embeddings z^1, z^2 of the two views
    a, c        views
    b (d,)      bias of the last layer, W (d, m) its weights, h^a its inputs: z^a = W h^a + b
    F           gradient ∂L/∂z, or its part outside of stop-gradients
    A_ac, B_ac  (d, d); α, β: their mean eigenvalues, for A_ac = α_ac I
    m_a, M_ca   mean of h^a, (m,); second moment (1/n) Σ_i h^c_i h^a_iᵀ, (m, m)
    H (m, m)    growth matrix: dW/dt = W H for A_ac = α_ac I and B_ac = β_ac I
    ρ           growth rate, eigenvalue of the map from W to dW/dt

The theorem and the tables of signatures are ours; Ziyin et al. (ICLR 2023, arXiv 2210.00638) analyse several losses
around the origin, one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stepwise_lightning.errors import UserError
from stepwise_lightning.losses import LOSSES, Loss, loss_settings, sum_terms
from stepwise_lightning.precision import TensorLike
from stepwise_lightning.theory.loss_derivatives import (
    TOLERANCE,
    LossDerivatives,
    PairLoss,
    equal_embeddings,
    in_float64,
)
from stepwise_lightning.user_loss import named_terms


@dataclass(frozen=True)
class LossSignature:
    """Value and derivatives of a loss at n equal pairs of embeddings b; see :func:`loss_signature`."""

    num_pairs: int
    """n."""
    saddle_value: float
    """L(b, b), the loss before the first mode is learned."""
    gradient: Tensor
    """n ∂L/∂z^a_i, (2, d). If it is not zero, W first moves along its product with the mean features."""
    permutation_invariant: bool
    """False if the loss depends on the order of the pairs; A and B then describe the first pair only."""
    isotropic: bool
    """True if all blocks A_ac and B_ac are multiples of one matrix, either I or I − b bᵀ/‖b‖²."""
    is_gradient: bool
    """False if the loss stops gradients: the derivatives of F are then computed by central differences."""
    alpha: Tensor
    """(2, 2), mean eigenvalue of each A_ac, without the direction of the bias if its eigenvalue is zero."""
    beta: Tensor
    """(2, 2), mean eigenvalue of each B_ac."""
    normal: Tensor | None
    """b/‖b‖ if A and B vanish along the bias, else None."""
    blocks: Tensor | None
    """A and B of a loss that is not isotropic, (2, 2, d, 2, d)."""

    @property
    def a(self) -> Tensor:
        """A, (2, d, 2, d): indices a, row, c, column."""
        return self._expand(self.alpha) if self.blocks is None else self.blocks[0]

    @property
    def b(self) -> Tensor:
        """B, (2, d, 2, d)."""
        return self._expand(self.beta) if self.blocks is None else self.blocks[1]

    def _expand(self, coefficients: Tensor) -> Tensor:
        projector = torch.eye(self.gradient.shape[1]).to(self.gradient)
        if self.normal is not None:
            projector -= self.normal.outer(self.normal)
        return torch.einsum("ac,de->adce", coefficients, projector)


def loss_signature(loss: str | PairLoss, dim: int, num_pairs: int, bias: TensorLike | None = None) -> LossSignature:
    r"""Return A and B of a loss, by automatic differentiation at n equal embeddings.

    The properties are tested with random directions. An isotropic loss takes eight evaluations of the gradient and up
    to five products with second derivatives, for any d; another loss takes 2d more products.

    A loss with a stop-gradient, such as BYOL or SimSiam, is not the potential of its gradient F. It is recognised by a
    disagreement of second derivatives and differences of F. Then A and B describe F, and need not be symmetric.

    Args:
        loss: a function of the embeddings of both views, float64, (n, d) each, that returns a scalar or a dictionary of
            terms; or a name in ``stepwise_lightning.losses.LOSSES``, with the default settings. Of a module, a float64
            copy is used.
        dim: d.
        num_pairs: n ≥ 2, the global batch size.
        bias: b, (d,), for a loss with cosine similarity; None for 0.

    Returns:
        The signature, on the CPU.

    Raises:
        ValueError: a loss that does not return a float64 scalar, is random, or is not differentiable at equal
            embeddings; arguments out of range.

    """
    field = LossDerivatives(bound_loss(loss, {}), dim, num_pairs, bias)
    permutation_invariant, is_gradient = field.is_permutation_invariant(), field.check_derivatives()
    product = field.second_derivatives if is_gradient else field.differences
    generator = torch.Generator().manual_seed(1)
    random = torch.randn(dim, generator=generator, dtype=torch.float64, device="cpu")
    normal = None if bias is None or not field.bias.any() else field.bias / field.bias.norm()
    if normal is not None:
        random -= (random @ normal) * normal
    random /= random.norm()
    a_random, total_random = field.block_products(random, product)
    alpha, total = (torch.einsum("adc,d->ac", x, random) for x in (a_random, total_random))
    size = float(torch.stack([a_random, total_random]).norm())
    deviations = [x - torch.einsum("ac,d->adc", y, random) for x, y in ((a_random, alpha), (total_random, total))]
    if normal is not None:
        along = field.block_products(normal, product)
        if torch.stack(along).norm() > TOLERANCE * size:
            deviations += [x - torch.einsum("ac,d->adc", y, normal) for x, y in zip(along, (alpha, total), strict=True)]
            normal = None
    isotropic = all(deviation.norm() <= TOLERANCE * size for deviation in deviations)
    blocks = None
    if not isotropic:
        columns = [field.block_products(unit, product) for unit in torch.eye(dim, dtype=torch.float64)]
        a, totals = (torch.stack(x, 3) for x in zip(*columns, strict=True))
        blocks = torch.stack([a, totals - a])
        rank = dim - (normal is not None)
        alpha, beta = (torch.einsum("adcd->ac", x) / rank for x in blocks)
    else:
        beta = total - alpha
    return LossSignature(
        num_pairs, field.value, field.at_point[:, 0] * num_pairs, permutation_invariant, isotropic,
        is_gradient, alpha, beta, normal, blocks,
    )  # fmt: skip


def saddle_value(
    loss: str | PairLoss, num_pairs: int, dim: int, bias: TensorLike | None = None, **settings: Any
) -> float:
    """Return the loss at equal embeddings b, at which training stands before the first mode is learned.

    Args:
        loss: a name in ``stepwise_lightning.losses.LOSSES``, or a function of both views' embeddings.
        num_pairs: n, the global batch size.
        dim: d.
        bias: b, (d,); None for 0.
        settings: arguments of a loss given by its name.

    Example:
        >>> from stepwise_lightning.theory import saddle_value
        >>> round(saddle_value("simclr", num_pairs=256, dim=10), 4)  # ln 511
        6.2364

    """
    z = equal_embeddings(num_pairs, dim, bias)
    with torch.no_grad():
        return float(sum_terms(named_terms(in_float64(bound_loss(loss, settings))(*z))))


def loss_properties(loss: str | PairLoss) -> Loss:
    """Return the properties of a loss. A function is assumed to drive the covariance, and may depend on any lengths."""
    if isinstance(loss, str):
        loss_settings(loss, {})  # raises a UserError for an unknown name
        return LOSSES[loss]
    owner = getattr(loss, "__self__", None)  # of a method, such as JointEmbedding.loss
    named: Any = loss if owner is None else getattr(owner, "loss_function", None) or type(owner)
    named = getattr(named, "func", named)  # of functools.partial
    name = getattr(named, "__name__", type(named).__name__)
    return Loss(name, name, loss, "covariance", uses_moments=False)


def checked_settings(loss: str | PairLoss, settings: dict[str, Any]) -> dict[str, Any]:
    """Return all settings of a loss given by its name, none for a function; raise a UserError for unknown settings."""
    if isinstance(loss, str):
        return loss_settings(loss, settings)
    bound_loss(loss, settings)
    return {}


def bound_loss(loss: str | PairLoss, settings: dict[str, Any]) -> PairLoss:
    """Return a loss as a function of two views: by its name with settings, or a function that has them."""
    if isinstance(loss, str):
        settings = loss_settings(loss, settings)
        return partial(LOSSES[loss].function, **settings)
    if not callable(loss):
        raise UserError(f"loss must be a name or a function of two views' embeddings, got {type(loss).__name__}")
    if settings:
        raise UserError(
            f"settings are for losses given by name, got {', '.join(settings)}: use functools.partial(loss, …)"
        )
    return loss
