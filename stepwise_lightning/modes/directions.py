"""Modes as directions: the eigenvectors that belong to a spectrum, and the coordinates of embeddings along them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepwise_lightning.errors import UserError
from stepwise_lightning.precision import as_float64
from stepwise_lightning.spectrum.matrices import MATRICES, TABLE, mean_direction

__all__ = ["Modes"]

# Below this share of the largest one an eigenvalue of float32 embeddings is round-off.
_LEAST_SHARE = 1e-12


@dataclass(frozen=True)
class Modes:
    """The directions of embedding space that the eigenvalues of one matrix belong to.

    A spectrum says how large each mode is; its direction says what it is of: the coordinate c_k(x) = v_kᵀ (s(x) − s̄)
    of an input x, with v_k the k-th eigenvector and s(x) the embedding as the matrix sees it: z itself for C and the
    covariance, z/‖z‖ for the normalised covariance, that without its part along the mean for the tangent covariance
    (:func:`stepwise_lightning.spectrum.measures.tangent_coordinates`). Means are always subtracted, also before C is
    formed: a direction in which all inputs agree tells none from another.

    The sign of an eigenvector is arbitrary; here its largest entry is positive.

    Attributes:
        matrix: which one, of ``stepwise_lightning.spectrum.MATRICES``.
        eigenvalues: (k,), descending, float64; those of C may be negative.
        directions: (d, k), orthonormal columns v_k, float64.
        origin: s̄, (d,), float64.
        axis: the direction of the mean of normalised embeddings, (d,); None but for the tangent covariance.

    """

    matrix: str
    eigenvalues: Tensor
    directions: Tensor
    origin: Tensor
    axis: Tensor | None = None

    @classmethod
    def of(cls, views: Tensor | Sequence[Tensor], matrix: str = "covariance") -> Modes:
        """Return the modes of embeddings.

        Args:
            views: (n, d) of one view, or of several, all of the same inputs; cast to float64 first. C needs two.
            matrix: whose eigenvectors they are.

        Returns:
            At most d modes; those without variance (below 1e-12 of the largest, or beyond the number of samples) are
            left out, so that there may be none.

        Raises:
            ValueError: an unknown matrix, shapes that do not fit, values that are not finite, one view for C.

        """
        if matrix not in MATRICES:
            raise UserError(f"unknown matrix {matrix!r}; choose from: {', '.join(MATRICES)}")
        z = [as_float64(view.detach(), "the embeddings") for view in ([views] if isinstance(views, Tensor) else views)]
        _check(z, matrix)
        axis = mean_direction(torch.cat(z)) if matrix == "tangent_covariance" else None
        seen = [TABLE[matrix].transform(view, axis) for view in z]
        origin = torch.cat(seen).mean(0)
        if matrix == "cross_correlation":
            first, second = (view - view.mean(0) for view in seen)
            product = first.T @ second / len(first)
            eigenvalues, vectors = (part.flip(-1) for part in torch.linalg.eigh((product + product.T) / 2))
        else:  # more dimensions than samples, as pixels have, cost no more this way
            _, lengths, rows = torch.linalg.svd(torch.cat(seen) - origin, full_matrices=False)
            eigenvalues, vectors = lengths.square() / sum(map(len, seen)), rows.T
        kept = eigenvalues.abs() > _LEAST_SHARE * eigenvalues.abs().max()
        eigenvalues, vectors = eigenvalues[kept], vectors[:, kept]
        signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
        return cls(matrix, eigenvalues, vectors * signs, origin, axis)

    def __len__(self) -> int:
        return len(self.eigenvalues)

    def coordinates(self, z: Tensor) -> Tensor:
        """Return the coordinates of embeddings (n, d) along the modes, (n, k), float64; gradients pass through."""
        return (TABLE[self.matrix].transform(z.double(), self.axis) - self.origin) @ self.directions


def _check(z: list[Tensor], matrix: str) -> None:
    shapes = {tuple(view.shape) for view in z}
    if len(shapes) != 1 or z[0].ndim != 2 or not z[0].numel():
        raise UserError(f"embeddings must be (n, d) and of one shape in all views, got {sorted(shapes)}")
    if matrix == "cross_correlation" and len(z) != 2:
        raise UserError(f"C is of two views, got {len(z)}: choose another matrix, or give both")
    if not all(view.isfinite().all() for view in z):
        raise UserError("the embeddings hold NaN or infinite values: training has diverged, or the input is not clean")
