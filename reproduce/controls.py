"""What an alignment has to be told from: a theory that knows nothing of pairs, and subspaces that share nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from stepwise_lightning.theory import subspace_alignment


def ordinary_kernel_pca(k: Tensor, rows: Tensor, dim: int) -> Tensor:
    """Return the embeddings of ordinary kernel PCA, uncentred, which is the closed form with P = I: it sees no pairs.

    Args:
        k: K(Z, Z) of all views, (2n, 2n).
        rows: K(x, Z) of the points to embed, (k, 2n).
        dim: d.

    Returns:
        (k, d), each column up to a factor.

    """
    return rows @ torch.linalg.eigh(k).eigenvectors[:, -dim:]


def permuted_alignment(f: Tensor, g: Tensor, draws: int = 20) -> float:
    """Return the mean subspace alignment of embeddings, (2n, d) each, whose images are permuted against each other.

    This is chance: what two embeddings of these sizes share, though they are of different images. Both views of a pair
    are moved together, and stay as alike as they are.

    Args:
        f: first views before second views.
        g: the same of another embedding.
        draws: permutations to average over.

    """
    generator = torch.Generator().manual_seed(0)
    n, total = len(f) // 2, 0.0
    for _ in range(draws):
        order = torch.randperm(n, generator=generator)
        total += float(subspace_alignment(f, g[torch.cat([order, n + order])]))
    return total / draws
