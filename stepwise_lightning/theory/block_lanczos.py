r"""Top eigenpairs of A: β ↦ (1/2n) P K̃ β, from products with the kernel matrix K̃ (legend: contrastive.py).

A is self-adjoint in the inner product ⟨u, v⟩ = uᵀ K̃ v. Block Lanczos: V_{i+1} B_i = A V_i minus its projection on the
earlier blocks, orthonormal in this inner product. The Ritz pairs of A on all blocks converge from the top; the residual
of a Ritz vector is exactly ‖B_i y‖, with y its part in the last block. Each block is orthogonalised twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import count

import torch
from torch import Tensor

from stepwise_lightning.errors import UserError
from stepwise_lightning.precision import as_float64, as_tensor
from stepwise_lightning.theory.process_group import KernelProcessGroup, process_group
from stepwise_lightning.theory.progress import progress_bar

# Number of pairs up to which a dense eigendecomposition is used.
_DENSE = 300
# Directions below this fraction of the largest are round-off.
_ROUND_OFF = 1e-12
# Temporary arrays of a kernel function, in units of its result.
_TEMPORARIES = 6
# Largest side of a tile, by device type (4096 elsewhere), and smallest side.
_MAX_SIDE = {"cpu": 512}
_MIN_SIDE = 16
# Largest relative excess of a rank's work over the mean.
_MAX_IMBALANCE = 0.1
_Tile = tuple[slice, slice, Tensor]  # rows, columns, values


class KernelOperator:
    """Products with the kernel matrix of 2n points, which is stored if it fits and otherwise recomputed in tiles.

    Only tiles on and above the diagonal are computed; small tiles keep the kernel's temporaries in cache. Each of P
    ranks computes 1/P of the tiles, 16 n² / P bytes, and a product is summed over the ranks. ``max_bytes`` limits the
    memory for kernel values on each rank. ``points`` are the first, then the second views.
    """

    def __init__(
        self, kernel: Callable[[Tensor, Tensor], Tensor], points: Tensor, max_bytes: int, progress: bool
    ) -> None:
        self.group = process_group()
        self.kernel, self.points, self.size = kernel, points, len(points)
        self.progress = progress
        self._compare_kernels(self.group.run_or_raise_everywhere(self._validated_sample))
        self._positions, largest = self._local_positions(self._balanced_side(self.tile_size(max_bytes, points)))
        self.tiles = self.group.run_or_raise_everywhere(self._stored_tiles) if 8 * largest <= max_bytes else None

    @staticmethod
    def tile_size(max_bytes: int, points: Tensor) -> int:
        """Return the side of the tiles in which the kernel matrix of the points is computed within ``max_bytes``."""
        largest, least = min(_MAX_SIDE.get(points.device.type, 4096), len(points)), min(_MIN_SIDE, len(points))
        side = math.isqrt(max_bytes // (8 * _TEMPORARIES))
        if side < least:
            required = 8 * _TEMPORARIES * least**2
            raise UserError(f"max_bytes must be at least {required} for one tile of kernel values, got {max_bytes}")
        return min(side, largest)

    def matmul(self, vectors: Tensor) -> Tensor:
        """Return K̃ times (2n, b) vectors."""
        tiles = self._computed_tiles() if self.tiles is None else self.tiles
        return self.group.all_reduce_sum(self.group.run_or_raise_everywhere(lambda: self._multiply(tiles, vectors)))

    def to_dense(self) -> Tensor:
        """Return the stored matrix, (2n, 2n)."""
        assert self.tiles is not None
        matrix = torch.zeros(self.size, self.size, dtype=torch.float64, device=self.points.device)
        for rows, columns, tile in self.tiles:
            matrix[columns, rows] = tile.T
            matrix[rows, columns] = tile
        return self.group.all_reduce_sum(matrix)

    @staticmethod
    def _multiply(tiles: Iterable[_Tile], vectors: Tensor) -> Tensor:
        result = torch.zeros_like(vectors)
        for rows, columns, tile in tiles:
            result[rows] += tile @ vectors[columns]
            if rows != columns:
                result[columns] += tile.T @ vectors[rows]
        return result

    def _balanced_side(self, side: int) -> int:
        """Return a side of at most ``side`` for tiles of similar size, enough of them for every rank."""
        number, ranks = -(-self.size // side), self.group.world_size
        if ranks > 1:
            # As few as balance the work: a tangent kernel computes the gradients of all rows and columns of a tile.
            tiles = ((m, m * (m + 1) // 2) for m in count(3))
            balanced = next(m for m, n in tiles if -(-n // ranks) * ranks / n - 1 <= _MAX_IMBALANCE)
            number = max(number, min(balanced, -(-self.size // _MIN_SIDE)))
        return -(-self.size // number)

    def _local_positions(self, side: int) -> tuple[list[tuple[slice, slice]], int]:
        """Return the positions of this rank's tiles, and the number of values of the rank with the most."""
        slices = [slice(i, min(i + side, self.size)) for i in range(0, self.size, side)]
        positions = [(rows, columns) for i, rows in enumerate(slices) for columns in slices[i:]]
        shares = [positions[rank :: self.group.world_size] for rank in range(self.group.world_size)]
        largest = max(sum((r.stop - r.start) * (c.stop - c.start) for r, c in share) for share in shares)
        return shares[self.group.rank], largest

    def _stored_tiles(self) -> list[_Tile]:
        # A kernel may return a view of a larger tensor.
        return [(rows, columns, tile.clone()) for rows, columns, tile in self._computed_tiles()]

    def _computed_tiles(self) -> Iterator[_Tile]:
        for rows, columns in progress_bar("kernel matrix", "tile", items=self._positions, shown=self.progress):
            x = self.points[rows]
            y = x if rows == columns else self.points[columns]
            tile = as_float64(self.kernel(x, y), "the kernel").detach().to(self.points.device)
            # One NaN or infinite value makes the sum not finite, which is faster to check.
            if not tile.sum().isfinite():
                raise UserError("the kernel returned NaN or infinite values: rescale the inputs or its length scale")
            yield rows, columns, tile

    def _validated_sample(self) -> Tensor:
        """Return the kernel matrix of the first and last points, after checks of its type, shape and symmetry."""
        points = torch.cat([self.points[:8], self.points[-8:]])
        sample = as_tensor(self.kernel(points, points), "the result of kernel(x, y)")
        if sample.shape != (len(points), len(points)) or sample.is_complex():
            got = f"{sample.dtype} of shape {tuple(sample.shape)}"
            raise UserError(f"kernel(x, y) must return a real (k, l) matrix, here {(len(points),) * 2}, got {got}")
        if not sample.is_floating_point() and sample.dtype != torch.int64:
            raise UserError(f"kernel(x, y) returned {sample.dtype}, whose sums overflow: cast its inputs to float64")
        if not (sample - sample.T).abs().max() <= 1e-5 * sample.abs().max() and sample.isfinite().all():
            raise UserError("kernel(x, x) must be symmetric, got an asymmetric matrix")
        return as_float64(sample.detach(), "the kernel")

    def _compare_kernels(self, sample: Tensor) -> None:
        """Raise if the kernels of the ranks differ by more than rounding, as for networks with different seeds."""
        first = self.group.broadcast(sample)
        differs = (sample - first).abs().max() > 1e-6 * first.abs().max()
        if self.group.all_reduce_sum(differs.long()) > 0:
            raise UserError("the ranks have different kernels: pass the same kernel and parameters on all ranks")


def top_eigenpairs(operator: KernelOperator, count: int, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the top ``count`` eigenvalues of A or all, K̃-orthonormal eigenvectors (2n, count), and residuals."""
    if operator.tiles is not None and operator.size <= 2 * _DENSE:
        eigenvalues, vectors, residuals = _dense(operator, count)
    else:
        eigenvalues, vectors, residuals = _block_lanczos(operator, count, tolerance)
    if len(eigenvalues) == 0:
        raise UserError(
            "the kernel of these pairs has no positive value: check that the views are not all zero, and that the "
            "network's outputs are not constant"
        )
    # A β / γ equals β without components in the null space of K̃ and round-off amplified by its small eigenvalues.
    positive = eigenvalues > _ROUND_OFF * eigenvalues.abs().max()
    vectors = vectors.clone()
    improved = _swap_views(operator.matmul(vectors[:, positive])) / (operator.size * eigenvalues[positive])
    vectors[:, positive] = improved
    return eigenvalues, operator.group.broadcast(vectors), residuals


def _swap_views(values: Tensor) -> Tensor:
    return values.roll(len(values) // 2, 0)


def _dense(operator: KernelOperator, count: int) -> tuple[Tensor, Tensor, Tensor]:
    weights, basis = _eigh(operator.group, operator.to_dense())
    kept = weights > _ROUND_OFF * weights[-1]
    root = basis[:, kept] * weights[kept].sqrt()
    eigenvalues, vectors = _eigh(operator.group, root.T @ _swap_views(root) / operator.size)
    eigenvalues, vectors = eigenvalues.flip(0)[:count], vectors.flip(1)[:, :count]
    vectors = basis[:, kept] / weights[kept].sqrt() @ vectors
    return eigenvalues, vectors, torch.zeros_like(eigenvalues)


def _block_lanczos(operator: KernelOperator, count: int, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    group = operator.group
    generator = torch.Generator().manual_seed(0)
    # A few extra vectors speed up convergence, and products are fastest at multiples of eight.
    width = min(-(-(count + 8) // 8) * 8, operator.size)
    start = torch.randn(operator.size, width, dtype=torch.float64, generator=generator, device="cpu")
    block = start.to(operator.points.device)
    block, images, _ = _orthonormalize(group, block, operator.matmul(block), 0.0)
    if block.shape[1] == 0:  # K̃ is zero
        return images.new_empty(0), block, images.new_empty(0)
    vectors, all_images = block, images
    with progress_bar("kernel modes", "product", shown=operator.progress) as bar:
        while True:
            bar.update()
            applied = _swap_views(images) / operator.size
            projected = all_images.T @ _swap_views(all_images) / operator.size
            ritz, coordinates = _eigh(group, projected)
            ritz, coordinates = ritz.flip(0)[:count], coordinates.flip(1)[:, :count]
            remainder = applied
            for _ in range(2):
                remainder = remainder - vectors @ (all_images.T @ remainder)
            min_norm = _ROUND_OFF * float(ritz.abs().max())
            block, images, coupling = _orthonormalize(group, remainder, operator.matmul(remainder), min_norm)
            residuals = group.broadcast((coupling @ coordinates[-applied.shape[1] :]).norm(dim=0))
            bar.set_postfix_str(f"residual {float(residuals.max() / ritz.abs().max()):.1e}", refresh=False)
            converged = len(ritz) == count and bool((residuals <= tolerance * ritz.abs().max()).all())
            if converged or block.shape[1] == 0 or vectors.shape[1] >= operator.size:
                return ritz, vectors @ coordinates, residuals
            vectors, all_images = torch.cat([vectors, block], 1), torch.cat([all_images, images], 1)


def _orthonormalize(
    group: KernelProcessGroup, vectors: Tensor, images: Tensor, min_norm: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return Q, K̃ Q and B with vectors = Q B and Qᵀ K̃ Q = I, without directions of norm up to ``min_norm``."""
    gram = _symmetric(vectors.T @ images)
    # Normalise the columns, which differ by orders of magnitude, for an accurate rank.
    norms = gram.diagonal().clamp(min=0).sqrt()
    scale = torch.where(norms > min_norm, 1 / norms, 0.0)
    squares, basis = _eigh(group, scale[:, None] * gram * scale)
    kept = squares > _ROUND_OFF
    roots, basis = squares[kept].sqrt(), basis[:, kept]
    mixing = scale[:, None] * basis / roots
    return vectors @ mixing, images @ mixing, roots[:, None] * basis.T * torch.where(scale > 0, norms, 0.0)


def _eigh(group: KernelProcessGroup, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues, ascending, and eigenvectors of a matrix that all ranks hold, equal on all ranks."""
    eigenvalues, vectors = torch.linalg.eigh(_symmetric(matrix))
    eigenpairs = group.broadcast(torch.cat([eigenvalues[None], vectors]))
    return eigenpairs[0], eigenpairs[1:]


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2
