"""How alike two embeddings of the same points are, up to what does not matter: a rotation, or any invertible map.

Each takes embeddings of the same n points, (n, d) each, of any real type, cast to float64 on the device of the first,
or on the CPU where that has no float64; and each says nothing without its baseline: :func:`chance_alignment` for random
subspaces, and the untrained network's own value beside the trained one's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepwise_lightning.errors import UserError
from stepwise_lightning.precision import as_float64


def subspace_alignment(f: Tensor, g: Tensor) -> Tensor:
    """Return ‖Q_fᵀ Q_g‖²_F / d in [0, 1], Q orthonormal bases of the column spaces: 1 where they are the same.

    Simon et al., ICML 2023. It is blind to any invertible map of the embeddings, also to one that brings a mode that
    has not been learned to the size of the others: restrict both to learned modes. With ranks r ≤ s the divisor d is
    the larger, s, so that 1 means equal subspaces.

    Example:
        >>> import torch
        >>> from stepwise_lightning.theory import subspace_alignment
        >>> axes = torch.eye(4)
        >>> float(subspace_alignment(axes[:, :2], axes[:, 1:3]))  # one direction in common, of two
        0.5

    Raises:
        ValueError: the embeddings are of different numbers of points, not matrices, empty, complex, zero or not finite.

    """
    f, g = _checked(f, g)
    bases = [_basis(z) for z in (f, g)]
    return (bases[0].T @ bases[1]).square().sum() / max(basis.shape[1] for basis in bases)


def chance_alignment(num_points: int, dimensions: int) -> float:
    """Return the mean :func:`subspace_alignment` of random subspaces: d / n."""
    if not 1 <= dimensions <= num_points:
        raise UserError(f"expected 1 ≤ dimensions ≤ num_points, got {dimensions} and {num_points}")
    return dimensions / num_points


def procrustes_distance(f: Tensor, g: Tensor) -> Tensor:
    """Return min over orthogonal R of ‖f/‖f‖ − g R/‖g‖‖²_F / 2 in [0, 1]: 0 where g is f, rotated and scaled.

    Schönemann, Psychometrika 1966. With M = fᵀ g it is 1 − ‖M‖_* / (‖f‖_F ‖g‖_F). Not centred. Embeddings of different
    widths are compared as if padded with zeros.

    Raises:
        ValueError: see :func:`subspace_alignment`.

    """
    f, g = _checked(f, g)
    return (1 - torch.linalg.svdvals(f.T @ g).sum() / (f.norm() * g.norm())).clamp(min=0)


def linear_cka(f: Tensor, g: Tensor) -> Tensor:
    """Return the centred kernel alignment ‖fᵀ g‖²_F / (‖fᵀ f‖_F ‖gᵀ g‖_F) of centred embeddings, in [0, 1].

    Kornblith et al., ICML 2019. It weighs directions by their variance, unlike :func:`subspace_alignment`.

    Raises:
        ValueError: see :func:`subspace_alignment`; also constant embeddings.

    """
    f, g = (z - z.mean(0) for z in _checked(f, g))
    if not f.any() or not g.any():
        raise UserError("constant embeddings have no centred alignment")
    return (f.T @ g).square().sum() / ((f.T @ f).norm() * (g.T @ g).norm())


def _basis(z: Tensor) -> Tensor:
    u, s, _ = torch.linalg.svd(z, full_matrices=False)
    return u[:, s > 1e-10 * s[0]]


def _checked(f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    if f.ndim != 2 or g.ndim != 2 or len(f) != len(g) or not f.numel() or not g.numel():
        raise UserError(
            f"expected embeddings (n, d) of the same points, got shapes {tuple(f.shape)} and {tuple(g.shape)}"
        )
    f = as_float64(f.detach(), "the first embeddings")
    g = as_float64(g.detach(), "the second embeddings").to(f.device)
    for name, z in (("first", f), ("second", g)):
        if not z.isfinite().all() or not z.any():
            raise UserError(f"the {name} embeddings are zero, or hold NaN or infinite values")
    return f, g
