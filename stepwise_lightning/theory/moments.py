"""Second moments of two views' features, from which the losses of a last linear layer are computed.

Legend
    n           number of positive pairs, with features h_i, h'_i in R^m; h̄, h̄' their means
    Γ (m, m)    the features' cross-correlation (1/2n) Σ_i (h_i h'_iᵀ + h'_i h_iᵀ)
    Σ_1, Σ_2    covariance of each view; Σ: covariance of all 2n views about their common mean; all unbiased
    D (m, m)    (1/n) Σ_i (h_i − h'_i)(h_i − h'_i)ᵀ
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stepwise_lightning.errors import UserError
from stepwise_lightning.precision import TensorLike, as_float64, check_finite, float64_pair


def feature_cross_correlation(x1: TensorLike, x2: TensorLike) -> Tensor:
    """Return Γ = (1/2n) Σ_i (x_i x'_iᵀ + x'_i x_iᵀ), the features' cross-correlation between two views.

    Γ is symmetric, not centred, and may have negative eigenvalues: shared content minus augmentation noise,
    Γ = (1/n) Σ_i (μ_i μ_iᵀ − δ_i δ_iᵀ) with μ = (x + x')/2 and δ = (x − x')/2.

    Args:
        x1: first views, (n, …), tensor or array, flattened to m features.
        x2: second views, of the same shape.

    Returns:
        Γ, (m, m), float64, on the device of ``x1``, or on the CPU if that device has no float64.

    Example:
        >>> import torch
        >>> from stepwise_lightning.theory import feature_cross_correlation
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> feature_cross_correlation(x, x)
        tensor([[0.5000, 0.0000],
                [0.0000, 2.0000]], dtype=torch.float64)

    Raises:
        ValueError: the views differ in shape, are empty or complex, or hold non-finite values.

    """
    x1, x2 = float64_pair(x1, x2, "views")
    check_view_shapes(x1, x2)
    product = x1.flatten(1).T @ x2.flatten(1) / len(x1)
    check_finite(product, "the views, or their products,", "clean or rescale them")
    return (product + product.T) / 2


def minimum_norm(eigenvalues: TensorLike) -> Tensor:
    """Return (Σ_j 1/γ_j)^{1/2} over the positive of γ_1 … γ_d, the smallest norm of a global minimum of ‖C − I_d‖²_F.

    The norm is ‖W‖_F for a linear model, and that of the kernel's Hilbert space for a kernel model. Among all global
    minima the modes of largest γ attain it, and training learns them from a small start. Source: Simon et al., ICML
    2023, arXiv 2303.15438.

    Args:
        eigenvalues: γ_1 … γ_d, the d largest eigenvalues of Γ, (d,).

    Example:
        >>> import torch
        >>> from stepwise_lightning.theory import minimum_norm
        >>> float(minimum_norm(torch.tensor([1.0, 0.25, -0.1])))  # W = [[1, 0, 0], [0, 2, 0], [0, 0, 0]]
        2.23606797749979

    """
    gamma = as_float64(eigenvalues, "eigenvalues")
    return (1 / gamma[gamma > 0]).sum().sqrt()


def check_view_shapes(x1: Tensor, x2: Tensor) -> None:
    """Raise a ValueError unless both views have the same shape (n, …), not empty."""
    if x1.shape != x2.shape:
        raise UserError(f"the two views must have the same shape, got {tuple(x1.shape)} and {tuple(x2.shape)}")
    if x1.ndim < 2 or x1.numel() == 0:
        raise UserError(f"views must have shape (pairs, features…) and not be empty, got {tuple(x1.shape)}")


@dataclass(frozen=True)
class FeatureMoments:
    """Second moments of two views' features, (m, m) each, float64; for batches, means of the batches' moments."""

    num_pairs: int  #: n, per batch
    cross: Tensor  #: (1/n) Σ_i (h_i − h̄)(h'_i − h̄')ᵀ; not symmetric
    uncentered_cross: Tensor  #: (1/n) Σ_i h_i h'_iᵀ
    covariance1: Tensor  #: Σ_1, with 1/(n − 1)
    covariance2: Tensor  #: Σ_2
    covariance: Tensor  #: Σ, with 1/(2n − 1)
    difference: Tensor  #: D

    @classmethod
    def of(cls, h1: TensorLike, h2: TensorLike) -> FeatureMoments:
        """Return the moments of features (n, m), or of batches of features (batches, n, m), at least 2 pairs each."""
        h1, h2 = validated_features(h1, h2)
        batches, n, _ = h1.shape
        means1, means2 = h1.mean(1), h2.mean(1)
        shifts = means1 - means2
        # Centre before multiplying, to avoid cancellation; sums over batches and pairs are then one product.
        c1, c2 = ((h - mean[:, None]).flatten(0, 1) for h, mean in ((h1, means1), (h2, means2)))
        delta = (h1 - h2).flatten(0, 1)
        scatter1, scatter2, cross = c1.T @ c1 / batches, c2.T @ c2 / batches, c1.T @ c2 / len(c1)
        return cls(
            num_pairs=n,
            cross=cross,
            uncentered_cross=cross + means1.T @ means2 / batches,
            covariance1=scatter1 / (n - 1),
            covariance2=scatter2 / (n - 1),
            covariance=(scatter1 + scatter2 + n / 2 * shifts.T @ shifts / batches) / (2 * n - 1),
            difference=delta.T @ delta / len(delta),
        )

    def gamma(self, center: bool = True) -> Tensor:
        """Return Γ of the centred features, or of the features without centring."""
        cross = self.cross if center else self.uncentered_cross
        return (cross + cross.T) / 2

    @property
    def pooled(self) -> Tensor:
        """Σ with 1/2n in place of 1/(2n − 1), the normalisation of the measured covariance of embeddings."""
        return self.covariance * (1 - 0.5 / self.num_pairs)


def validated_features(h1: TensorLike, h2: TensorLike) -> tuple[Tensor, Tensor]:
    """Return two views' features as float64 of shape (batches, n, m); ValueError for invalid features."""
    h1, h2 = (h.detach() for h in float64_pair(h1, h2, "views' features"))
    if h1.shape != h2.shape or h1.ndim not in (2, 3) or h1.numel() == 0:
        raise UserError(
            "features of both views must have the same shape, (pairs, features) or (batches, pairs, features), "
            f"and not be empty, got {tuple(h1.shape)} and {tuple(h2.shape)}"
        )
    if h1.shape[-2] < 2:
        raise UserError(f"a covariance needs at least 2 pairs per batch, got {h1.shape[-2]}: use larger batches")
    for h in (h1, h2):
        check_finite(h, "the features", "check the data, or lower the learning rate")
    return (h1, h2) if h1.ndim == 3 else (h1[None], h2[None])
