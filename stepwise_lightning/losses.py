"""The losses, as pure functions of the two views' embeddings z1, z2 of shape (n, d). No distributed code in here."""

from __future__ import annotations

import torch
from torch import Tensor


def barlow_twins_loss(
    z1: Tensor,
    z2: Tensor,
    off_diagonal_weight: float = 0.0051,
    normalize: bool = True,
    center: bool = False,
    eps: float = 1e-5,
) -> Tensor:
    """Return Σ_i (C_ii − 1)² + off_diagonal_weight · Σ_{i≠j} C_ij² for a cross-correlation C (d, d) of the views.

    Args:
        z1: embeddings of the first views, (n, d).
        z2: embeddings of the second views, (n, d).
        off_diagonal_weight: the published λ.
        normalize: True for the published loss (Zbontar et al., ICML 2021), where
            C = ẑ1ᵀẑ2 / n and ẑ is z batch-normalised with the biased variance. False for the analytical model of
            Simon et al. (arXiv 2303.15438), where C = (z1ᵀz2 + z2ᵀz1) / 2n; with weight 1 this is ‖C − I‖²_F.
        center: with ``normalize=False``, subtract each view's mean first (the paper does not).
        eps: with ``normalize=True``, added to the variance under the root.

    Returns:
        A scalar of the embeddings' type.

    Raises:
        ValueError: the views' shapes differ, are not (n, d), or are empty.

    """
    _check_views(z1, z2)
    if normalize or center:
        z1, z2 = z1 - z1.mean(0), z2 - z2.mean(0)
    if normalize:
        z1 = z1 * (z1.square().mean(0) + eps).rsqrt()
        z2 = z2 * (z2.square().mean(0) + eps).rsqrt()
    c = z1.T @ z2
    c = c / len(z1) if normalize else (c + c.T) / (2 * len(z1))
    identity = torch.eye(len(c), dtype=c.dtype, device=c.device)
    weight = off_diagonal_weight + (1 - off_diagonal_weight) * identity
    return (weight * (c - identity).square()).sum()


def _check_views(z1: Tensor, z2: Tensor) -> None:
    if z1.shape != z2.shape or z1.ndim != 2 or z1.numel() == 0:
        raise ValueError(
            f"the two views' embeddings must have one shape (samples, dimensions), not empty, "
            f"got {tuple(z1.shape)} and {tuple(z2.shape)}"
        )
