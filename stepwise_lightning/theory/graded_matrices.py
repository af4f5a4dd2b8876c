"""Linear algebra for graded matrices, whose entries span hundreds of orders of magnitude.

General eigensolvers are accurate relative to the *largest* eigenvalue; modes that have not been learned yet are far
smaller. Jacobi rotations compute every eigenvalue of a graded matrix with high relative accuracy (Demmel and Veselić,
*Jacobi's method is more accurate than QR*, SIAM J. Matrix Anal. Appl. 13, 1992).
"""

from __future__ import annotations

import torch
from torch import Tensor

# A column is independent if its part outside the span of earlier columns exceeds this fraction of its norm.
_INDEPENDENT = 1e-7
_MAX_SWEEPS = 30  # of Jacobi rotations


def row_echelon(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the rows of ``columns`` (d, m) so that row i is zero before the i-th independent column.

    For generic columns this is the R factor of a QR decomposition. A column that depends on earlier ones (a start
    without a component along some mode, identical rows) has no row; the next independent column takes its place.
    Entries that are zero in exact arithmetic are set to zero, because the growth of a faster mode would amplify
    round-off. Returns Qᵀ columns with Q orthogonal, (d, m), and the index of the first nonzero entry of each row, (d,),
    m − 1 for zero rows.
    """
    d, m = columns.shape
    basis = columns.new_zeros(d, 0)
    pivots: list[int] = []
    for index, column in enumerate(columns.T):
        residual = column
        for _ in range(2):  # one pass is not orthogonal to float64 precision
            residual = residual - basis @ (basis.T @ residual)
        norm = residual.norm()
        if norm > _INDEPENDENT * column.norm():
            basis = torch.cat([basis, (residual / norm)[:, None]], dim=1)
            pivots.append(index)
            if len(pivots) == d:
                break
    rows = columns.new_zeros(d, m)
    rows[: len(pivots)] = basis.T @ columns
    for row, pivot in zip(rows, pivots, strict=False):
        row[:pivot] = 0
    pivots += [m - 1] * (d - len(pivots))
    return rows, torch.tensor(pivots, device=columns.device)


def pencil_eigenvalues(rows: Tensor, pivots: Tensor, weights: Tensor, log_squares: Tensor, start: Tensor) -> Tensor:
    """Return the eigenvalues of the pencil (G, I − C_0 + G), G = rows diag(weights · e^log_squares) rowsᵀ, (T, d).

    Row and column i are scaled by b_i ≤ 1 to bound every entry: entry (i, k ≥ i) of G is a sum over the columns in
    which row k is nonzero, and none of them grows faster than its pivot. Relative to the pivot no term overflows, and
    no significant term underflows. ``rows`` (d, m) and ``pivots`` (d,) are from :func:`row_echelon`, ``log_squares``
    (T, m) descends along m, and ``start`` is C_0, (d, d): G at log_squares = 0.
    """
    # Zero rows do not grow; the pivot of one would overflow at late times, and 0 × ∞ is NaN.
    pivot_squares = torch.where(rows.any(1), log_squares[:, pivots], 0.0)  # (T, d)
    leading = weights[pivots] * rows[torch.arange(len(rows), device=rows.device), pivots].square()
    log_b = -torch.nn.functional.softplus(pivot_squares + leading.clamp(min=0).log()) / 2
    grown = log_squares.new_empty(len(log_squares), len(rows), len(rows))
    for k in range(len(rows)):
        relative = (log_squares - pivot_squares[:, k, None]).clamp_(max=0).exp_()
        entries = relative @ (weights * rows[k] * rows[: k + 1]).T  # (T, k + 1)
        entries *= (pivot_squares[:, k, None] + log_b[:, k, None] + log_b[:, : k + 1]).exp()
        grown[:, k, : k + 1] = grown[:, : k + 1, k] = entries
    b = log_b.exp()
    total = b[:, :, None] * (torch.eye(len(rows)).to(rows) - start) * b[:, None] + grown
    factor = torch.linalg.cholesky(total)
    half = torch.linalg.solve_triangular(factor, grown, upper=False)
    pencil = torch.linalg.solve_triangular(factor, half.mT, upper=False)
    return jacobi_eigenvalues((pencil + pencil.mT) / 2)


def jacobi_eigenvalues(matrices: Tensor) -> Tensor:
    """Return the eigenvalues of symmetric (…, d, d) matrices by cyclic Jacobi rotations, descending, (…, d).

    The rotations end when every off-diagonal entry is negligible compared with the geometric mean of its two diagonal
    entries, which gives small eigenvalues of graded matrices relative accuracy. Each round applies d/2 disjoint
    rotations at once, in round-robin order.
    """
    d = matrices.shape[-1]
    a = torch.nn.functional.pad(matrices, (0, d % 2, 0, d % 2))
    rounds = _tournament(a.shape[-1], a.device)
    tolerance = 4 * torch.finfo(a.dtype).eps
    for _ in range(_MAX_SWEEPS):
        for p, q in rounds:
            a = _rotate(a, p, q)
        scale = a.diagonal(dim1=-2, dim2=-1).abs().sqrt()
        negligible = tolerance * scale[..., :, None] * scale[..., None, :] + torch.finfo(a.dtype).tiny
        if (a.triu(1).abs() <= negligible).all():
            break
    return a.diagonal(dim1=-2, dim2=-1)[..., :d].sort(dim=-1, descending=True).values


def _rotate(a: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Apply the rotations that annihilate a[p, q] for disjoint index pairs."""
    app, aqq, apq = a[..., p, p], a[..., q, q], a[..., p, q]
    theta = (aqq - app) / (2 * apq)
    # Beyond 1e150, θ² would overflow, and the tangent is 1/(2θ) to float64 precision.
    tangent = torch.where(theta < 0, -1.0, 1.0) / (theta.abs() + (1 + theta.clamp(-1e150, 1e150).square()).sqrt())
    tangent = torch.where(apq == 0, 0.0, tangent)
    cosine = (1 + tangent.square()).rsqrt()
    sine = tangent * cosine
    a = a.clone()
    rows_p, rows_q = a[..., p, :], a[..., q, :]
    c, s = cosine[..., None], sine[..., None]
    a[..., p, :], a[..., q, :] = c * rows_p - s * rows_q, s * rows_p + c * rows_q
    columns_p, columns_q = a[..., :, p], a[..., :, q]
    c, s = cosine[..., None, :], sine[..., None, :]
    a[..., :, p], a[..., :, q] = c * columns_p - s * columns_q, s * columns_p + c * columns_q
    a[..., p, p], a[..., q, q] = app - tangent * apq, aqq + tangent * apq
    a[..., p, q] = a[..., q, p] = torch.zeros_like(apq)
    return a


def _tournament(d: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Return d − 1 rounds of disjoint pairs of d (even) indices that cover every pair once."""
    players = list(range(d))
    rounds = []
    for _ in range(d - 1):
        first, second = players[: d // 2], players[d // 2 :][::-1]
        rounds.append((torch.tensor(first, device=device), torch.tensor(second, device=device)))
        players = [players[0], players[-1], *players[1:-1]]
    return rounds
