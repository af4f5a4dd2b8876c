"""The second moments of two views' features, on which the losses of a last linear layer depend.

Legend
    n           number of positive pairs, with features h_i, h'_i in R^m; h̄, h̄' their means
    Γ (m, m)    the features' cross-correlation (1/2n) Σ_i (h_i h'_iᵀ + h'_i h_iᵀ)
    Σ_1, Σ_2    covariance of either view; Σ that of all 2n views together about one mean; all unbiased
    D (m, m)    (1/n) Σ_i (h_i − h'_i)(h_i − h'_i)ᵀ
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stepwise_lightning.errors import UserError
from stepwise_lightning.precision import as_float64

__all__ = ["FeatureMoments", "checked_features"]


@dataclass(frozen=True)
class FeatureMoments:
    """The second moments of two views' features on which losses depend, (m, m) each, float64.

    Of batches they are the means of the batches' own moments, which is what mini-batches do to a last layer on average.
    """

    num_pairs: int
    """n, pairs in a batch."""
    cross: Tensor
    """(1/n) Σ_i (h_i − h̄)(h'_i − h̄')ᵀ; not symmetric."""
    uncentered_cross: Tensor
    """(1/n) Σ_i h_i h'_iᵀ."""
    covariance1: Tensor
    """Σ_1, of the first views, with 1/(n − 1)."""
    covariance2: Tensor
    """Σ_2, of the second views."""
    covariance: Tensor
    """Σ, of all 2n views about one mean, with 1/(2n − 1)."""
    difference: Tensor
    """D, not centred."""

    @classmethod
    def of(cls, h1: Tensor, h2: Tensor) -> FeatureMoments:
        """Return the moments of features (n, m), or of batches of them (batches, n, m).

        Raises:
            ValueError: the views differ in shape, have fewer than 2 pairs, are complex or hold non-finite values.

        """
        h1, h2 = checked_features(h1, h2)
        n = h1.shape[1]
        sums: list[Tensor] = []
        for a, b in zip(h1, h2, strict=True):  # one at a time: of wide features (batches, m, m) would not fit
            mean1, mean2 = a.mean(0), b.mean(0)
            # Centred before they are multiplied, or the means would take the digits of what varies.
            c1, c2, delta = a - mean1, b - mean2, a - b
            scatter1, scatter2, cross = c1.T @ c1, c2.T @ c2, c1.T @ c2 / n
            shift = mean1 - mean2
            pooled = (scatter1 + scatter2 + n / 2 * shift.outer(shift)) / (2 * n - 1)
            moments = [cross, cross + mean1.outer(mean2), scatter1 / (n - 1), scatter2 / (n - 1), pooled]
            moments.append(delta.T @ delta / n)
            sums = [total + moment for total, moment in zip(sums, moments, strict=True)] if sums else moments
        return cls(n, *(total / len(h1) for total in sums))

    def gamma(self, center: bool = True) -> Tensor:
        """Return Γ, of centred features or of the features themselves."""
        cross = self.cross if center else self.uncentered_cross
        return (cross + cross.T) / 2

    @property
    def pooled(self) -> Tensor:
        """Σ with 1/2n: of embeddings, it is the covariance whose eigenvalues are measured."""
        return self.covariance * (1 - 0.5 / self.num_pairs)


def checked_features(h1: Tensor, h2: Tensor) -> tuple[Tensor, Tensor]:
    """Return two views' features as float64 of shape (batches, n, m), on one device.

    Raises:
        ValueError: see :meth:`FeatureMoments.of`.

    """
    if h1.shape != h2.shape or h1.ndim not in (2, 3) or h1.numel() == 0:
        raise UserError(
            "the two views' features must have one shape (pairs, features) or (batches, pairs, features), not empty, "
            f"got {tuple(h1.shape)} and {tuple(h2.shape)}"
        )
    if h1.shape[-2] < 2:
        raise UserError(f"features need at least 2 pairs in a batch for a covariance, got {h1.shape[-2]}: give more")
    a = as_float64(h1, "the first views' features")
    b = as_float64(h2, "the second views' features").to(a.device)
    if not (a.isfinite().all() and b.isfinite().all()):
        raise UserError("the features hold NaN or infinite values: look at the data, or lower the learning rate")
    return (a, b) if a.ndim == 3 else (a[None], b[None])
