r"""Top eigenpairs of β ↦ (1/2n) P K̃ β, from products with the kernel matrix K̃ alone (legend: contrastive.py).

The operator A is self-adjoint in ⟨u, v⟩ = uᵀ K̃ v. Block Lanczos: V_{i+1} B_i = A V_i − (what lies in earlier blocks),
orthonormal in that inner product; the Ritz pairs of A on all blocks converge from the top, and ‖B_i y‖, y the last
block's part of a Ritz vector, is exactly its residual. Each block is orthogonalised against all earlier ones, twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate, count

import torch
from torch import Tensor
from tqdm import tqdm

from stepwise_lightning.errors import UserError
from stepwise_lightning.precision import as_float64
from stepwise_lightning.theory.process_group import KernelProcessGroup, process_group

# Pairs up to which all eigenpairs are computed at once.
_DENSE = 300
# Directions below this share of the largest are round-off.
_ROUND_OFF = 1e-12
# Kernel functions make a few arrays as large as their result on the way to it.
_TEMPORARIES = 6
# Rows and columns of a tile of the kernel matrix: at most, by type of device (4096 elsewhere), and at least.
_SIDE = {"cpu": 512}
_LEAST_SIDE = 16
# How much longer than its part of the work a rank may take, for the number of tiles.
_WAIT = 0.1
# Its rows, its columns, its values.
_Tile = tuple[slice, slice, Tensor]


class KernelOperator:
    """Products with the kernel matrix of a set of points, which is held if it fits and recomputed in tiles if not.

    Tiles on and above the diagonal stand for those below it, and small ones keep the kernel's temporaries in cache.

    P ranks share them: each has a P-th of the tiles, 16 n² / P bytes, and of whatever is multiplied the rows of some
    pairs, both views of each. In a product it gets all rows from the others, and of its own rows their part of the sum.
    Points are taken in the order of these rows.
    """

    def __init__(
        self, kernel: Callable[[Tensor, Tensor], Tensor], points: Tensor, max_bytes: int, progress: bool
    ) -> None:
        self.group = process_group()
        self.kernel, self.points, self.size = kernel, points, len(points)
        self.progress = progress and self.group.rank == 0
        self._compare_kernels(self.group.run_or_raise_everywhere(self._checked_sample))
        self.side = self._side(self.tile_size(max_bytes, points))
        if self.group.world_size > 1:
            self.points = points[self.row_order()]
        own, most = self._own_places()
        self.held = self.group.run_or_raise_everywhere(lambda: self._kept(own)) if 8 * most <= max_bytes else None
        self._places = own

    @staticmethod
    def tile_size(max_bytes: int, points: Tensor) -> int:
        """Return the side of the tiles in which the kernel matrix of these points is made, within so many bytes."""
        largest, least = min(_SIDE.get(points.device.type, 4096), len(points)), min(_LEAST_SIDE, len(points))
        side = math.isqrt(max_bytes // (8 * _TEMPORARIES))
        if side < least:
            raise UserError(
                f"max_bytes {max_bytes} cannot hold one tile of kernel values: at least {8 * _TEMPORARIES * least**2}"
            )
        return min(side, largest)

    def row_order(self) -> Tensor:
        """Return which view stands in which row, (2n,): those of rank 0's pairs, first and second ones, and so on."""
        both = torch.arange(self.size).view(2, -1)
        shares = [self.group.shard(both.shape[1], rank=rank) for rank in range(self.group.world_size)]
        return torch.cat([both[:, share].flatten() for share in shares])

    def local_rows(self, rows: Tensor) -> Tensor:
        """Return this rank's part of (2n, …), which is in the order of the points as they were given."""
        return rows[self.row_order()[self.group.shard(self.size, 2)].to(rows.device)]

    def gather_rows(self, own: Tensor) -> Tensor:
        """Return (2n, …) in the order of the points as they were given, of which every rank has its part."""
        rows = self.group.all_gather_rows(own, self.size, 2)
        return rows[self.row_order().argsort().to(rows.device)]

    def matmul(self, vectors: Tensor) -> Tensor:
        """Return K̃ times (2n, b), of which this rank gives and gets its own rows."""
        vectors = self.group.all_gather_rows(vectors, self.size, 2)
        if self.held is None:
            part = self.group.run_or_raise_everywhere(lambda: self._part(vectors, self._tiles(self._places)))
        else:
            part = self._part(vectors, self.held)
        return self.group.reduce_scatter_sum(part, 2)

    def to_dense(self) -> Tensor:
        """Return the matrix, if it is held, on every rank, (2n, 2n)."""
        assert self.held is not None
        matrix = torch.zeros(self.size, self.size, dtype=torch.float64, device=self.points.device)
        for rows, columns, tile in self.held:
            matrix[columns, rows] = tile.T
            matrix[rows, columns] = tile
        places = self.row_order().argsort()
        return self.group.all_reduce_sum(matrix)[places[:, None], places]

    @staticmethod
    def _part(vectors: Tensor, tiles: Iterable[_Tile]) -> Tensor:
        result = torch.zeros_like(vectors)
        for rows, columns, tile in tiles:
            result[rows] += tile @ vectors[columns]
            if rows != columns:
                result[columns] += tile.T @ vectors[rows]
        return result

    def _side(self, side: int) -> int:
        """Return the side of tiles of about one size, of which there are enough for every rank."""
        number = -(-self.size // side)
        if self.group.world_size > 1:
            # as few as share the work evenly: tangent kernels take the gradients of all rows and columns of a tile
            even = next(m for m in count(3) if _excess(m * (m + 1) // 2, self.group.world_size) <= _WAIT)
            number = max(number, min(even, -(-self.size // _LEAST_SIDE)))
        return -(-self.size // number)

    def _own_places(self) -> tuple[list[tuple[slice, slice]], int]:
        """Return where this rank's tiles are, and of how many values the largest such part is."""
        slices = [slice(i, min(i + self.side, self.size)) for i in range(0, self.size, self.side)]
        places = [(rows, columns) for i, rows in enumerate(slices) for columns in slices[i:]]
        areas = [(rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns in places]
        parts: list[list[int]] = [[] for _ in range(self.group.world_size)]
        # one after the other, so that a rank's tiles lie in few rows
        for index, before in enumerate(accumulate(areas, initial=0)):
            if index < len(areas):
                parts[int((before + areas[index] / 2) / sum(areas) * self.group.world_size)].append(index)
        most = max(sum(areas[index] for index in part) for part in parts)
        return [places[index] for index in parts[self.group.rank]], most

    def _kept(self, places: list[tuple[slice, slice]]) -> list[_Tile]:
        # copies, because a kernel may return part of something larger
        return [(rows, columns, tile.clone()) for rows, columns, tile in self._tiles(places)]

    def _tiles(self, places: list[tuple[slice, slice]]) -> Iterator[_Tile]:
        for rows, columns in tqdm(
            places, "kernel matrix", unit="tile", delay=5, disable=not self.progress, leave=False
        ):
            x = self.points[rows]
            y = x if rows == columns else self.points[columns]
            tile = as_float64(self.kernel(x, y).detach(), "the kernel").to(self.points.device)
            # one NaN or infinite value makes the sum so, and a sum is quicker than a look at each
            if not tile.sum().isfinite():
                raise UserError("the kernel returned NaN or infinite values: rescale the inputs or its length scale")
            yield rows, columns, tile

    def _checked_sample(self) -> Tensor:
        """Return the kernel of a few points, from both ends, that shows whether it is one."""
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
        return as_float64(sample.detach(), "the kernel")

    def _compare_kernels(self, sample: Tensor) -> None:
        """Refuse ranks with kernels that differ by more than rounding, such as those of networks of several seeds."""
        first = self.group.broadcast(sample)

        def compare() -> None:
            if (sample - first).abs().max() > 1e-6 * first.abs().max():
                raise UserError("the ranks have different kernels: give all the same one, with the same parameters")

        self.group.run_or_raise_everywhere(compare)


def _excess(tiles: int, number: int) -> float:
    """Return how much more than its part a rank may have of so many tiles."""
    return -(-tiles // number) * number / tiles - 1


def top_eigenpairs(operator: KernelOperator, count: int, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ``count`` largest eigenvalues, K̃-orthonormal eigenvectors (2n, count), residuals; fewer if A has."""
    if operator.held is not None and operator.size <= 2 * _DENSE:
        eigenvalues, vectors, residuals = _dense(operator, count)
    else:
        eigenvalues, vectors, residuals = _block_lanczos(operator, count, tolerance)
    # A β / γ equals β, but is free of what K̃ does not see and of what small eigenvalues of K̃ have amplified.
    positive = eigenvalues > _ROUND_OFF * eigenvalues.abs().max()
    improved = _swap_views(operator.matmul(vectors[:, positive])) / (operator.size * eigenvalues[positive])
    vectors = vectors.clone()
    vectors[:, positive] = improved
    return eigenvalues, operator.gather_rows(vectors), residuals


def _swap_views(values: Tensor) -> Tensor:
    return values.roll(len(values) // 2, 0)


def _dense(operator: KernelOperator, count: int) -> tuple[Tensor, Tensor, Tensor]:
    weights, basis = _eigh(operator.group, operator.to_dense())
    kept = weights > _ROUND_OFF * weights[-1]
    root = basis[:, kept] * weights[kept].sqrt()
    eigenvalues, vectors = _eigh(operator.group, root.T @ _swap_views(root) / operator.size)
    eigenvalues, vectors = eigenvalues.flip(0)[:count], vectors.flip(1)[:, :count]
    vectors = basis[:, kept] / weights[kept].sqrt() @ vectors
    return eigenvalues, operator.local_rows(vectors), torch.zeros_like(eigenvalues)


def _block_lanczos(operator: KernelOperator, count: int, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    group = operator.group
    generator = torch.Generator().manual_seed(0)
    # a few more than asked for converge together, and products are fastest at multiples of eight
    width = min(-(-(count + 8) // 8) * 8, operator.size)
    start = torch.randn(operator.size, width, dtype=torch.float64, generator=generator)
    block = operator.local_rows(start).to(operator.points.device)
    block, images, _ = _orthonormalize(group, block, operator.matmul(block), 0.0)
    vectors, products_of = block, images
    with tqdm(desc="kernel modes", unit="product", delay=2, disable=not operator.progress, leave=False) as bar:
        while True:
            bar.update()
            applied = _swap_views(images) / operator.size
            ritz, coordinates = _eigh(
                group, group.all_reduce_sum(products_of.T @ _swap_views(products_of)) / operator.size
            )
            ritz, coordinates = ritz.flip(0)[:count], coordinates.flip(1)[:, :count]
            rest = applied
            for _ in range(2):
                rest = rest - vectors @ group.all_reduce_sum(products_of.T @ rest)
            least = _ROUND_OFF * float(ritz.abs().max())
            block, images, coupling = _orthonormalize(group, rest, operator.matmul(rest), least)
            residuals = group.broadcast((coupling @ coordinates[-applied.shape[1] :]).norm(dim=0))
            bar.set_postfix_str(f"residual {float(residuals.max() / ritz.abs().max()):.1e}", refresh=False)
            enough = len(ritz) == count and bool((residuals <= tolerance * ritz.abs().max()).all())
            if enough or block.shape[1] == 0 or vectors.shape[1] >= operator.size:
                return ritz, vectors @ coordinates, residuals
            vectors, products_of = torch.cat([vectors, block], 1), torch.cat([products_of, images], 1)


def _orthonormalize(
    group: KernelProcessGroup, vectors: Tensor, images: Tensor, least: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return Q, K̃Q and B with vectors = Q B, Q orthonormal in K̃; directions of norm up to ``least`` are dropped."""
    gram = _symmetric(group.all_reduce_sum(vectors.T @ images))
    # Columns differ by orders of magnitude: brought to one length, the Gram matrix resolves what they span.
    lengths = gram.diagonal().clamp(min=0).sqrt()
    scale = torch.where(lengths > least, 1 / lengths, 0.0)
    squares, basis = _eigh(group, scale[:, None] * gram * scale)
    kept = squares > _ROUND_OFF
    roots, basis = squares[kept].sqrt(), basis[:, kept]
    mixing = scale[:, None] * basis / roots
    return vectors @ mixing, images @ mixing, roots[:, None] * basis.T * torch.where(scale > 0, lengths, 0.0)


def _eigh(group: KernelProcessGroup, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, ascending, and eigenvectors of what all ranks hold, the same on all."""
    eigenvalues, vectors = torch.linalg.eigh(_symmetric(matrix))
    both = group.broadcast(torch.cat([eigenvalues[None], vectors]))
    return both[0], both[1:]


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2
