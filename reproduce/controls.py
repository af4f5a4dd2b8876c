"""Closed forms of kernel matrices, and comparison of embeddings: no pairs, permuted images, up to a rotation."""

from __future__ import annotations

import torch
from torch import Tensor

from stepwise_lightning.theory import ContrastiveKernelPCA, subspace_alignment


def kernel_matrix_pca(k: Tensor, modes: int, shift: int = 0) -> tuple[ContrastiveKernelPCA, Tensor]:
    """Fit contrastive kernel PCA of a kernel matrix; return it with its embeddings of all views, (2n, modes).

    Args:
        k: K(Z, Z), (2n, 2n), first views before second views.
        modes: number of modes; the number of positive modes if there are fewer.
        shift: pair each first view with the second view of the pair ``shift`` places before; 0 for right pairs.

    """
    indices = torch.arange(len(k), dtype=torch.float64)[:, None]  # the kernel is a function of row indices
    x1, x2 = indices.chunk(2)
    x2 = x2.roll(shift, 0)
    pairs = [torch.cat(views)[:, 0].long() for views in ((x1, x2), (x2, x1))]
    gamma = torch.linalg.eigvals(k[pairs[1]][:, pairs[0]]).real
    modes = min(modes, int((gamma > 1e-8 * gamma.max()).sum()))
    machine = ContrastiveKernelPCA(lambda a, b: k[a[:, 0].long()][:, b[:, 0].long()], modes, progress=False)
    machine.fit(x1, x2)
    return machine, machine.transform(indices)


def ordinary_kernel_pca(k: Tensor, rows: Tensor, dim: int) -> Tensor:
    """Return the embeddings of uncentred kernel PCA, the closed form with P = I, which ignores the pairs.

    Args:
        k: K(Z, Z) of all views, (2n, 2n).
        rows: K(x, Z) of the points to embed, (k, 2n).
        dim: d.

    Returns:
        (k, d), each column up to a factor.

    """
    return rows @ torch.linalg.eigh(k).eigenvectors[:, -dim:]


def permuted_alignment(f: Tensor, g: Tensor, draws: int = 20) -> float:
    """Return the mean subspace alignment of two embeddings, (2n, d) each, over random permutations of the images.

    This is the chance level for embeddings of these sizes. Both views of a pair move together, which preserves their
    correlation.

    Args:
        f: first embedding, first views before second views.
        g: second embedding, in the same order.
        draws: number of permutations.

    """
    generator = torch.Generator().manual_seed(0)
    n, total = len(f) // 2, 0.0
    for _ in range(draws):
        order = torch.randperm(n, generator=generator)
        total += float(subspace_alignment(f, g[torch.cat([order, n + order])]))
    return total / draws


def procrustes_error(f: Tensor, g: Tensor) -> float:
    """Return min_Q ‖f − g Q‖ / ‖f‖ over orthogonal Q, for two embeddings (n, d): their values, up to one rotation."""
    overlap = torch.linalg.svdvals(g.T @ f).sum()
    return float((f.square().sum() + g.square().sum() - 2 * overlap).clamp(min=0).sqrt() / f.norm())
