r"""Top eigenpairs of β ↦ (1/2n) P K̃ β, from products with the kernel matrix K̃ alone (legend: contrastive.py).

The operator A is self-adjoint in ⟨u, v⟩ = uᵀ K̃ v. Block Lanczos: V_{i+1} B_i = A V_i − (what lies in earlier blocks),
orthonormal in that inner product; the Ritz pairs of A on all blocks converge from the top, and ‖B_i y‖, y the last
block's part of a Ritz vector, is exactly its residual. Each block is orthogonalised against all earlier ones, twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from stepwise_lightning.errors import UserError
from stepwise_lightning.precision import as_float64

# Pairs up to which all eigenpairs are computed at once.
_DENSE = 300
# Directions below this share of the largest are round-off.
_ROUND_OFF = 1e-12
# Kernel functions make a few arrays as large as their result on the way to it.
_TEMPORARIES = 6
# Rows and columns of a tile of the kernel matrix: at most, by type of device (4096 elsewhere), and at least.
_SIDE = {"cpu": 512}
_LEAST_SIDE = 16


class KernelProducts:
    """Products with the kernel matrix of a set of points, which is held if it fits and recomputed in tiles if not.

    Tiles on and above the diagonal stand for those below it, and small ones keep the kernel's temporaries in cache.
    """

    def __init__(
        self, kernel: Callable[[Tensor, Tensor], Tensor], points: Tensor, max_bytes: int, progress: bool
    ) -> None:
        self.kernel, self.points, self.size, self.progress = kernel, points, len(points), progress
        self._check_kernel()
        self.side = self.side_within(max_bytes, points)
        self.matrix = self._filled() if 8 * self.size**2 <= max_bytes else None

    @staticmethod
    def side_within(max_bytes: int, points: Tensor) -> int:
        """Return the side of the tiles in which the kernel matrix of these points is made, within so many bytes."""
        largest, least = min(_SIDE.get(points.device.type, 4096), len(points)), min(_LEAST_SIDE, len(points))
        side = math.isqrt(max_bytes // (8 * _TEMPORARIES))
        if side < least:
            raise UserError(
                f"max_bytes {max_bytes} cannot hold one tile of kernel values: at least {8 * _TEMPORARIES * least**2}"
            )
        return min(side, largest)

    def times(self, vectors: Tensor) -> Tensor:
        """Return K̃ times (2n, b)."""
        if self.matrix is not None:
            # a symmetric matrix from the right: faster by half for more than a few vectors
            return (vectors.T @ self.matrix).T
        result = torch.zeros_like(vectors)
        for rows, columns, tile in self._tiles():
            result[rows] += tile @ vectors[columns]
            if rows != columns:
                result[columns] += tile.T @ vectors[rows]
        return result

    def _tiles(self) -> Iterator[tuple[slice, slice, Tensor]]:
        starts = range(0, self.size, self.side)
        places = [(i, j) for i in starts for j in starts if i <= j]
        for i, j in tqdm(places, "kernel matrix", unit="tile", delay=5, disable=not self.progress, leave=False):
            rows, columns = slice(i, i + self.side), slice(j, j + self.side)
            tile = as_float64(self.kernel(self.points[rows], self.points[columns]).detach(), "the kernel")
            tile = tile.to(self.points.device)
            # one NaN or infinite value makes the sum so, and a sum is quicker than a look at each
            if not tile.sum().isfinite():
                raise UserError("the kernel returned NaN or infinite values: rescale the inputs or its length scale")
            yield rows, columns, tile

    def _filled(self) -> Tensor:
        matrix = torch.empty(self.size, self.size, dtype=torch.float64, device=self.points.device)
        for rows, columns, tile in self._tiles():
            matrix[rows, columns] = tile
            matrix[columns, rows] = tile.T.contiguous()
        return matrix

    def _check_kernel(self) -> None:
        """Look at a few points, from both ends."""
        some = torch.cat([self.points[:8], self.points[-8:]])
        sample = self.kernel(some, some)
        if not isinstance(sample, Tensor) or sample.shape != (len(some), len(some)) or sample.is_complex():
            got = f"{sample.dtype} of shape {tuple(sample.shape)}" if isinstance(sample, Tensor) else type(sample)
            raise UserError(f"kernel(x, y) must be a real (k, l) matrix, here {(len(some),) * 2}, but is {got}")
        if not sample.is_floating_point() and sample.dtype != torch.int64:
            raise UserError(
                f"kernel(x, y) returned {sample.dtype}, in which sums wrap around: let it cast its inputs to float64"
            )
        if not (sample - sample.T).abs().max() <= 1e-5 * sample.abs().max() and sample.isfinite().all():
            raise UserError("kernel(x, x) must be symmetric: this one is not")


def top_modes(products: KernelProducts, count: int, tolerance: float, progress: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ``count`` largest eigenvalues, K̃-orthonormal eigenvectors (2n, count), residuals; fewer if A has."""
    dense = products.matrix is not None and products.size <= 2 * _DENSE
    if dense:
        eigenvalues, vectors, residuals = _dense(products, count)
    else:
        eigenvalues, vectors, residuals = _block_lanczos(products, count, tolerance, progress)
    # A β / γ equals β, but is free of what K̃ does not see and of what small eigenvalues of K̃ have amplified.
    positive = eigenvalues > _ROUND_OFF * eigenvalues.abs().max()
    improved = _swap(products.times(vectors[:, positive])) / (products.size * eigenvalues[positive])
    vectors = vectors.clone()
    vectors[:, positive] = improved
    return eigenvalues, vectors, residuals


def _swap(values: Tensor) -> Tensor:
    return values.roll(len(values) // 2, 0)


def _dense(products: KernelProducts, count: int) -> tuple[Tensor, Tensor, Tensor]:
    matrix = products.matrix
    assert matrix is not None
    weights, basis = torch.linalg.eigh((matrix + matrix.T) / 2)
    kept = weights > _ROUND_OFF * weights[-1]
    root = basis[:, kept] * weights[kept].sqrt()
    eigenvalues, vectors = torch.linalg.eigh(root.T @ _swap(root) / products.size)
    eigenvalues, vectors = eigenvalues.flip(0)[:count], vectors.flip(1)[:, :count]
    return eigenvalues, basis[:, kept] / weights[kept].sqrt() @ vectors, torch.zeros_like(eigenvalues)


def _block_lanczos(
    products: KernelProducts, count: int, tolerance: float, progress: bool
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    # a few more than asked for converge together, and products are fastest at multiples of eight
    width = min(-(-(count + 8) // 8) * 8, products.size)
    start = torch.randn(products.size, width, dtype=torch.float64, generator=generator).to(products.points.device)
    block, images, _ = _orthonormalised(start, products.times(start), 0.0)
    vectors, products_of = block, images
    with tqdm(desc="kernel modes", unit="product", delay=2, disable=not progress, leave=False) as bar:
        while True:
            bar.update()
            applied = _swap(images) / products.size
            ritz, coordinates = torch.linalg.eigh(_symmetric(products_of.T @ _swap(products_of)) / products.size)
            ritz, coordinates = ritz.flip(0)[:count], coordinates.flip(1)[:, :count]
            rest = applied
            for _ in range(2):
                rest = rest - vectors @ (products_of.T @ rest)
            block, images, coupling = _orthonormalised(rest, products.times(rest), _ROUND_OFF * float(ritz.abs().max()))
            residuals = (coupling @ coordinates[-applied.shape[1] :]).norm(dim=0)
            bar.set_postfix_str(f"residual {float(residuals.max() / ritz.abs().max()):.1e}", refresh=False)
            enough = len(ritz) == count and bool((residuals <= tolerance * ritz.abs().max()).all())
            if enough or block.shape[1] == 0 or vectors.shape[1] >= products.size:
                return ritz, vectors @ coordinates, residuals
            vectors, products_of = torch.cat([vectors, block], 1), torch.cat([products_of, images], 1)


def _orthonormalised(vectors: Tensor, images: Tensor, least: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return Q, K̃Q and B with vectors = Q B, Q orthonormal in K̃; directions of norm up to ``least`` are dropped."""
    gram = _symmetric(vectors.T @ images)
    # Columns differ by orders of magnitude: brought to one length, the Gram matrix resolves what they span.
    lengths = gram.diagonal().clamp(min=0).sqrt()
    scale = torch.where(lengths > least, 1 / lengths, 0.0)
    squares, basis = torch.linalg.eigh(scale[:, None] * gram * scale)
    kept = squares > _ROUND_OFF
    roots, basis = squares[kept].sqrt(), basis[:, kept]
    mixing = scale[:, None] * basis / roots
    return vectors @ mixing, images @ mixing, roots[:, None] * basis.T * torch.where(scale > 0, lengths, 0.0)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2
