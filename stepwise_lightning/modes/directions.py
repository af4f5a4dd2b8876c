"""Eigenvectors of a spectrum, and coordinates of embeddings along them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepwise_lightning.errors import UserError
from stepwise_lightning.precision import as_float64
from stepwise_lightning.spectrum.matrices import MATRICES, TABLE, mean_direction

_MIN_SHARE = 1e-12  # of the largest eigenvalue; smaller eigenvalues of float32 embeddings are round-off


@dataclass(frozen=True)
class Modes:
    """Eigenvalues and eigenvectors of one matrix of the embeddings.

    The coordinate of an input x along mode k is c_k(x) = v_kᵀ (s(x) − s̄), with the k-th eigenvector v_k. s(x) is the
    embedding z for C and the covariance, z/‖z‖ for the normalised covariance, and z/‖z‖ without its component along the
    mean for the tangent covariance (:func:`stepwise_lightning.spectrum.measures.tangent_coordinates`). The mean is
    always subtracted, also before C is computed, because a component equal for all inputs does not distinguish them.

    The sign of each eigenvector is chosen to make its largest entry positive.
    """

    matrix: str  #: a name in ``stepwise_lightning.spectrum.matrices.MATRICES``
    eigenvalues: Tensor  #: (k,), descending, float64; eigenvalues of C may be negative
    directions: Tensor  #: (d, k), orthonormal columns v_k, float64
    origin: Tensor  #: s̄, (d,), float64
    axis: Tensor | None = None  #: direction of the mean of the normalised embeddings, (d,), for the tangent covariance

    @classmethod
    def of(cls, views: Tensor | Sequence[Tensor], matrix: str = "covariance") -> Modes:
        """Return the modes of embeddings.

        Args:
            views: embeddings (n, d) of one view, or of several views of the same inputs, computed in float64. C needs
                two views.
            matrix: a name in ``stepwise_lightning.spectrum.matrices.MATRICES``.

        Returns:
            At most d modes, possibly none: modes without variance (below 1e-12 of the largest) are omitted.

        Raises:
            ValueError: an unknown matrix, mismatched shapes, values that are not finite, or one view for C.

        """
        if matrix not in MATRICES:
            raise UserError(f"unknown matrix {matrix!r}; choose from: {', '.join(MATRICES)}")
        z = [as_float64(view.detach(), "the embeddings") for view in ([views] if isinstance(views, Tensor) else views)]
        _check(z, matrix)
        axis = mean_direction(torch.cat(z)) if matrix == "tangent_covariance" else None
        transformed = [TABLE[matrix].transform(view, axis) for view in z]
        origin = torch.cat(transformed).mean(0)
        if matrix == "cross_correlation":
            first, second = (view - view.mean(0) for view in transformed)
            product = first.T @ second / len(first)
            eigenvalues, vectors = (part.flip(-1) for part in torch.linalg.eigh((product + product.T) / 2))
        else:  # an SVD is cheap also with more dimensions than samples
            _, lengths, rows = torch.linalg.svd(torch.cat(transformed) - origin, full_matrices=False)
            eigenvalues, vectors = lengths.square() / sum(map(len, transformed)), rows.T
        kept = eigenvalues.abs() > _MIN_SHARE * eigenvalues.abs().max()
        eigenvalues, vectors = eigenvalues[kept], vectors[:, kept]
        signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
        return cls(matrix, eigenvalues, vectors * signs, origin, axis)

    def __len__(self) -> int:
        return len(self.eigenvalues)

    def coordinates(self, z: Tensor) -> Tensor:
        """Return the coordinates of embeddings (n, d) along the modes, (n, k), float64; gradients pass through.

        They are on the device of the modes, which is that of the embeddings of :meth:`of`, or the CPU if that device
        has no float64.
        """
        z = as_float64(z, "the embeddings").to(self.origin.device)
        return (TABLE[self.matrix].transform(z, self.axis) - self.origin) @ self.directions


def _check(z: list[Tensor], matrix: str) -> None:
    shapes = {tuple(view.shape) for view in z}
    if len(shapes) != 1 or z[0].ndim != 2 or not z[0].numel():
        raise UserError(f"embeddings must be (n, d) with the same shape in all views, got {sorted(shapes)}")
    if matrix == "cross_correlation" and len(z) != 2:
        raise UserError(f"cross_correlation needs two views, got {len(z)}: choose another matrix, or give both views")
    if not all(view.isfinite().all() for view in z):
        raise UserError("the embeddings contain NaN or infinite values: check for diverged training or invalid inputs")
