"""Subspace alignment of two embeddings of the same points, and its value for random subspaces."""

from __future__ import annotations

import torch
from torch import Tensor

from stepwise_lightning.errors import UserError
from stepwise_lightning.precision import TensorLike, float64_pair


def subspace_alignment(f: TensorLike, g: TensorLike) -> Tensor:
    """Return ‖Q_fᵀ Q_g‖²_F / d in [0, 1], with Q orthonormal bases of the column spaces; 1 for equal subspaces.

    Source: Simon et al., ICML 2023, arXiv 2303.15438. The value is invariant to any invertible linear map of either
    embedding, also to one that rescales a mode that has not been learned; to exclude such modes, restrict both
    embeddings to learned ones. For column spaces of dimensions r ≤ s, d is s.

    Compare the value with :func:`chance_alignment` and with the alignment of the untrained network.

    Args:
        f: embeddings of n points, (n, d), tensor or array of any real type; cast to float64.
        g: other embeddings of the same points, (n, d'); moved to the device of ``f``.

    Example:
        >>> import torch
        >>> from stepwise_lightning.theory import subspace_alignment
        >>> axes = torch.eye(4)
        >>> float(subspace_alignment(axes[:, :2], axes[:, 1:3]))  # one common direction of two
        0.5

    Raises:
        ValueError: different numbers of points; embeddings that are not matrices, empty, complex, zero or not finite.

    """
    f, g = (z.detach() for z in float64_pair(f, g, "embeddings"))
    if f.ndim != 2 or g.ndim != 2 or len(f) != len(g) or not f.numel() or not g.numel():
        raise UserError(
            f"expected embeddings (n, d) of the same points, got shapes {tuple(f.shape)} and {tuple(g.shape)}"
        )
    for name, z in (("first", f), ("second", g)):
        if not z.isfinite().all() or not z.any():
            raise UserError(f"the {name} embeddings are zero, or contain NaN or infinite values")
    bases = [_basis(z) for z in (f, g)]
    return (bases[0].T @ bases[1]).square().sum() / max(basis.shape[1] for basis in bases)


def chance_alignment(num_points: int, dimensions: int) -> float:
    """Return the mean :func:`subspace_alignment` of random subspaces of dimension d in R^n: d / n."""
    if not 1 <= dimensions <= num_points:
        raise UserError(f"expected 1 ≤ dimensions ≤ num_points, got {dimensions} and {num_points}")
    return dimensions / num_points


def _basis(z: Tensor) -> Tensor:
    u, s, _ = torch.linalg.svd(z, full_matrices=False)
    return u[:, s > 1e-10 * s[0]]
