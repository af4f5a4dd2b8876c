r"""Contrastive kernel PCA: what a kernel machine learns with Barlow Twins, in closed form, for any kernel.

Source: Simon et al., *On the Stepwise Nature of Self-Supervised Learning*, ICML 2023, arXiv 2303.15438.
What goes beyond the paper is marked so.

Legend
    n           number of positive pairs (x_i, x'_i); Z = [X; X'] all 2n views
    K̃ (2n, 2n)  kernel matrix of Z
    P (2n, 2n)  the swap of the two views, [[0, I], [I, 0]]
    γ_j, β_j    eigenpairs of (1/2n) P K̃, γ_1 ≥ γ_2 ≥ … > 0, with β_iᵀ K̃ β_j = δ_ij
    s_j(t)      singular values of the learned map; time t = learning rate × steps
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from stepwise_lightning.errors import UserError
from stepwise_lightning.precision import as_float64, check_real, on_float64_device
from stepwise_lightning.theory.block_lanczos import KernelOperator, top_eigenpairs
from stepwise_lightning.theory.estimator import Estimator, function_name
from stepwise_lightning.theory.linear import LinearBarlowTwins
from stepwise_lightning.theory.process_group import process_group

Kernel = Callable[[Tensor, Tensor], Tensor]
# Eigenvalues below this share of the largest cannot be told from zero.
_ZERO = 1e-12


class ContrastiveKernelPCA(Estimator):
    r"""The embedding that kernel Barlow Twins learns from small initialisation, and the way there.

    The model minimises ‖C − I_d‖²_F, C = (1/2n) Σ_i (f(x_i) f(x'_i)ᵀ + f(x'_i) f(x_i)ᵀ), over functions of the kernel's
    Hilbert space. From small initialisation it learns the top eigenfunctions of the contrastive kernel one after the
    other and ends at f_j(x) = γ_j^{−1/2} Σ_i β_ij K(z_i, x), up to a rotation of the embedding.

    The paper writes this with K̃^{−1/2}. Here (beyond the paper) neither a root nor an inverse is taken: the operator
    β ↦ (1/2n) P K̃ β is self-adjoint in ⟨u, v⟩ = uᵀ K̃ v, and its top eigenpairs are found by block Lanczos iteration in
    that inner product, which needs products with K̃ only and does not mind singular K̃ (identical crops happen). Up to
    300 pairs a dense eigendecomposition on the range of K̃ is used instead.

    Args:
        kernel: any callable ``kernel(x, y)``, (k, …) and (l, …) to (k, l), symmetric and positive semi-definite, such
            as those of :mod:`stepwise_lightning.theory.kernels`; wrap arguments with ``functools.partial``.
        n_components: d, number of modes.
        max_bytes: memory for kernel values, of each process. The kernel matrix is held where half of it, 16 n² bytes,
            fits, or where a process's part of that does; otherwise it is recomputed in tiles at each iteration.
        tolerance: residual at which the iteration stops, relative to γ_1; eigenvalues are then right to its square.
        progress: show a progress bar on fits that take long.

    Attributes (after ``fit``):
        eigenvalues_: γ_1 … γ_d, (d,).
        coefficients_: β, (2n, d), the first n rows for X; signs make the largest |f_j| on Z positive.
        residuals_: ‖A β_j − γ_j β_j‖ in the K̃ norm, A the operator, (d,).

    Once ``torch.distributed`` is initialised, the ranks share ``fit`` and all that embeds: they call it together
    with the same arguments, and get the model of one process. What one calls alone stands in ``with one_process():``
    (:mod:`stepwise_lightning.theory.process_group`).

    Everything is float64 on the device of the views, or on the CPU where that has no float64. The kernel gets views as
    they are, also integers, where all are of one type; where types differ it gets float64.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from stepwise_lightning.theory import ContrastiveKernelPCA, rbf_kernel
        >>> angles = torch.arange(60) * 0.1  # two views of a point on a circle, a little apart
        >>> x1, x2 = (torch.stack([a.cos(), a.sin()], dim=1) for a in (angles, angles + 0.05))
        >>> model = ContrastiveKernelPCA(partial(rbf_kernel, length_scale=1.0), n_components=3).fit(x1, x2)
        >>> model
        ContrastiveKernelPCA(kernel=rbf_kernel(length_scale=1.0), n_components=3, fitted on 60 pairs)
        >>> model.transform(x1).shape, round(float(model.loss(x1, x2)), 6)
        (torch.Size([60, 3]), 0.0)

    Raises:
        ValueError: ``n_components`` or ``tolerance`` out of range; see :meth:`fit`.

    """

    eigenvalues_: Tensor
    coefficients_: Tensor
    residuals_: Tensor

    def __init__(
        self,
        kernel: Kernel,
        n_components: int,
        max_bytes: int = 4 * 2**30,
        tolerance: float = 1e-7,
        progress: bool = True,
    ) -> None:
        if n_components < 1:
            raise UserError(f"n_components must be at least 1, got {n_components}")
        if not 0 < tolerance < 1:
            raise UserError(f"tolerance must lie between 0 and 1, got {tolerance}")
        self.kernel, self.n_components, self.max_bytes = kernel, n_components, max_bytes
        self.tolerance, self.progress = tolerance, progress

    def __repr__(self) -> str:
        fitted = f"fitted on {len(self._views) // 2} pairs" if hasattr(self, "eigenvalues_") else "not fitted"
        return f"ContrastiveKernelPCA(kernel={function_name(self.kernel)}, n_components={self.n_components}, {fitted})"

    def fit(self, x1: Tensor, x2: Tensor, operator: type[KernelOperator] = KernelOperator) -> Self:
        """Find the top modes on pairs of views.

        Args:
            x1: first views, (n, …), as the kernel takes them.
            x2: second views, (n, …).
            operator: what multiplies with the kernel matrix, for those who want to count or time that.

        Raises:
            ValueError: views that differ in shape, are empty, complex or not finite; a kernel matrix of wrong shape,
                complex, of narrow integers, not finite or not symmetric; fewer positive modes than ``n_components``
                (the error says how many there are); ``max_bytes`` too small for one tile of the kernel matrix (the
                error says what is enough); ranks that do not all call this, with the same views and kernel.

        """
        group = process_group()
        group.check_same_call("ContrastiveKernelPCA.fit", x1, x2, self.n_components, self.max_bytes, self.tolerance)
        self._views = torch.cat(group.run_or_raise_everywhere(lambda: _checked_views(x1, x2)))
        kernel_matrix = operator(self.kernel, self._views, self.max_bytes, self.progress)
        eigenvalues, coefficients, residuals = top_eigenpairs(kernel_matrix, self.n_components, self.tolerance)
        positive = int((eigenvalues > _ZERO * eigenvalues.abs().max()).sum())
        if positive < self.n_components:
            raise UserError(
                f"n_components {self.n_components} is more than the {positive} positive modes that these "
                f"{len(x1)} pairs have under this kernel: choose 1 to {positive}"
                if positive
                else "these pairs have no positive mode under this kernel: the views of a pair have nothing in common"
            )
        # f_j on a view is proportional to β_j of the other view of its pair: both peak with one sign
        peaks = coefficients.gather(0, coefficients.abs().argmax(0, keepdim=True)).sign()
        self.eigenvalues_, self.coefficients_, self.residuals_ = eigenvalues, coefficients * peaks, residuals
        return self

    def fit_transform(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        """Fit and return the final embeddings of both views, (n, d) each."""
        self.fit(x1, x2)
        return self.transform(x1), self.transform(x2)

    def transform(self, x: Tensor) -> Tensor:
        """Return the final embeddings γ_j^{−1/2} Σ_i β_ij K(z_i, x) of any points: (k, …) to (k, d).

        Raises:
            ValueError: called before ``fit``.

        """
        return self._eigenfunctions(x) / self.eigenvalues_.sqrt()

    def transform_at(self, x: Tensor, t: Tensor | float, initial_singular_values: Tensor) -> Tensor:
        """Return the embeddings during training, Σ_i β_ij K(z_i, x) s_j(t) with s_j(t) of :class:`LinearBarlowTwins`.

        Args:
            x: (k, …).
            t: learning rate × steps, ≥ 0, scalar or (T,).
            initial_singular_values: s_j(0), (d,), in the order of the modes.

        Returns:
            (k, d) for a scalar ``t``, (T, k, d) for ``t`` of shape (T,).

        Raises:
            ValueError: called before ``fit``; negative times; ``initial_singular_values`` of another shape or negative.

        """
        singular_values = self._trajectory(initial_singular_values).singular_values(t)
        return self._eigenfunctions(x) * singular_values.unsqueeze(-2)

    def initial_singular_values(self, f1: Tensor, f2: Tensor) -> Tensor:
        """Return s_j(0) of a model whose initial embeddings of the pairs of ``fit`` are ``f1``, ``f2``, (n, d') each.

        In the basis of the eigenfunctions the start is W(0) V = Fᵀ β, F = [f1; f2], and its QR decomposition gives
        s_j(0) = |R_jj|, as for :class:`LinearBarlowTwins`. So a network's own start, with its tangent kernel, predicts
        when it learns what: the kernel need not generate the embeddings, only their part in its span is seen.

        Returns:
            (d,); d' must be at least d.

        Raises:
            ValueError: called before ``fit``; embeddings of other shapes, or not finite.

        """
        self._check_fitted()
        starts = [as_float64(f.detach(), "initial embeddings").to(self.coefficients_.device) for f in (f1, f2)]
        if f1.shape != f2.shape or f1.ndim != 2 or 2 * len(f1) != len(self._views) or f1.shape[1] < self.n_components:
            raise UserError(
                f"initial embeddings must have shape ({len(self._views) // 2}, at least {self.n_components}) for each "
                f"view, got {tuple(f1.shape)} and {tuple(f2.shape)}"
            )
        f = torch.cat(starts)
        if not f.isfinite().all():
            raise UserError("the initial embeddings hold NaN or infinite values")
        return torch.linalg.qr(f.T @ self.coefficients_, mode="r").R.diagonal().abs()

    def embedding_eigenvalues(self, t: Tensor | float, initial_singular_values: Tensor) -> Tensor:
        """Return the eigenvalues of C during training, by the uniform form of :class:`LinearBarlowTwins`.

        (d,) for a scalar ``t`` (learning rate × steps), (T, d) for ``t`` of shape (T,).
        """
        return self._trajectory(initial_singular_values).embedding_eigenvalues(t)

    def step_times(self, initial_singular_values: Tensor) -> Tensor:
        """Return τ_j = −log(s_j(0)² γ_j) / 8γ_j, when each mode is learned, (d,); see :class:`LinearBarlowTwins`."""
        return self._trajectory(initial_singular_values).step_times

    def contrastive_kernel(self, x: Tensor, y: Tensor) -> Tensor:
        """Return k_Γ(x, y) = (1/2n) Σ_i [K(x, x_i) K(x'_i, y) + K(x, x'_i) K(x_i, y)], (k, l)."""
        self._check_fitted()
        left, right = (self._kernel(points, self._views) for points in (x, y))
        half = len(self._views) // 2
        return (left[:, :half] @ right[:, half:].T + left[:, half:] @ right[:, :half].T) / (2 * half)

    def loss(self, x1: Tensor, x2: Tensor) -> Tensor:
        """Return ‖C − I_d‖²_F of the final embeddings on other pairs, (n, …) each: 0 on those of ``fit``."""
        f1, f2 = (self.transform(view) for view in _checked_views(x1, x2))
        c = f1.T @ f2 / len(f1)
        return ((c + c.T) / 2 - torch.eye(self.n_components).to(c)).square().sum()

    def save(self, path: str | Path) -> None:
        """Save what was fitted, as plain tensors; the kernel is code and stays with you.

        Raises:
            ValueError: called before ``fit``.

        """
        self._check_fitted()
        fitted = {"eigenvalues": self.eigenvalues_, "coefficients": self.coefficients_, "residuals": self.residuals_}
        torch.save(fitted | {"views": self._views}, path)

    @classmethod
    def load(cls, path: str | Path, kernel: Kernel) -> Self:
        """Return a fitted model from :meth:`save`, with the kernel it was fitted with.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or something else; nothing in it is run.

        """
        fitted = _read_fitted(path)
        model = cls(kernel, len(fitted["eigenvalues"]))
        model.eigenvalues_, model.coefficients_ = fitted["eigenvalues"], fitted["coefficients"]
        model.residuals_, model._views = fitted["residuals"], fitted["views"]
        return model

    def _check_fitted(self) -> None:
        if not hasattr(self, "eigenvalues_"):
            raise UserError("this ContrastiveKernelPCA is not fitted yet: call fit(x1, x2) first")

    def _trajectory(self, initial_singular_values: Tensor) -> LinearBarlowTwins:
        """Return the linear model in the basis of the eigenfunctions, where it is diagonal."""
        self._check_fitted()
        start = as_float64(initial_singular_values, "initial_singular_values").to(self.eigenvalues_.device)
        if start.shape != self.eigenvalues_.shape or not (start >= 0).all():
            raise UserError(
                f"initial_singular_values must be {self.n_components} values ≥ 0, got {initial_singular_values}"
            )
        return LinearBarlowTwins(torch.diag(self.eigenvalues_), torch.diag(start))

    def _eigenfunctions(self, x: Tensor) -> Tensor:
        self._check_fitted()
        side = KernelOperator.tile_size(self.max_bytes, self._views)
        parts = list(zip(self._views.split(side), self.coefficients_.split(side), strict=True))

        def values(points: Tensor) -> Tensor:
            return torch.cat([sum(self._kernel(rows, views) @ b for views, b in parts) for rows in points.split(side)])

        group = process_group()
        group.check_same_call("ContrastiveKernelPCA.transform", x, self.coefficients_)
        return group.map_rows(values, x)

    def _kernel(self, x: Tensor, views: Tensor) -> Tensor:
        check_real(x, "the points")
        x, views = _in_one_type(on_float64_device(x).to(views.device), views)
        return as_float64(self.kernel(x, views), "the kernel").to(self.coefficients_.device)


def _checked_views(x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    if x1.shape != x2.shape:
        raise UserError(f"the two views must have one shape, got {tuple(x1.shape)} and {tuple(x2.shape)}")
    if x1.ndim < 2 or x1.numel() == 0:
        raise UserError(f"views must have shape (pairs, features…) and not be empty, got {tuple(x1.shape)}")
    for name, x in (("first", x1), ("second", x2)):
        check_real(x, f"the {name} views")
        if not x.isfinite().all():
            raise UserError(f"the {name} views hold NaN or infinite values: clean them")
    x1 = on_float64_device(x1)
    return _in_one_type(x1, on_float64_device(x2).to(x1.device))


def _in_one_type(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as they are if they are of one type, else as float64: no type of the two holds all of both."""
    return (x, y) if x.dtype == y.dtype else (x.double(), y.double())


def _read_fitted(path: str | Path) -> dict[str, Tensor]:
    """Return what ``ContrastiveKernelPCA.save`` has written; nothing in the file is run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or something else.

    """
    try:
        fitted = torch.load(path, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch and its unpickler raise whatever they come across
        kind = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{str(path)!r} cannot be read as a saved model ({kind}): fit and save it again") from error
    if not _is_fitted(fitted):
        raise UserError(f"{str(path)!r} does not hold a fitted ContrastiveKernelPCA: fit and save it again")
    return fitted


def _is_fitted(saved: Any) -> bool:
    """Whether ``saved`` is what ``ContrastiveKernelPCA.save`` writes."""
    names = ("eigenvalues", "coefficients", "residuals", "views")
    if not isinstance(saved, dict) or not all(isinstance(saved.get(name), Tensor) for name in names):
        return False
    eigenvalues, coefficients, residuals, views = (saved[name] for name in names)
    return (
        eigenvalues.ndim == 1
        and len(eigenvalues) > 0
        and eigenvalues.shape == residuals.shape
        and views.ndim > 1
        and len(views) % 2 == 0
        and coefficients.shape == (len(views), len(eigenvalues))
        and all(not saved[name].is_complex() and bool(saved[name].isfinite().all()) for name in names)
        and all(saved[name].dtype == torch.float64 for name in names[:3])
        and bool((eigenvalues > 0).all())
    )
