r"""Contrastive kernel PCA: the solution of Barlow Twins for kernel models in closed form.

Source: Simon et al., *On the Stepwise Nature of Self-Supervised Learning*, ICML 2023, arXiv 2303.15438. The iteration
without K̃^{−1/2} is derived here.

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
from stepwise_lightning.precision import TensorLike, as_float64, as_tensor, check_finite, check_real, float64_device
from stepwise_lightning.theory.block_lanczos import KernelOperator, top_eigenpairs
from stepwise_lightning.theory.estimator import Estimator, function_name
from stepwise_lightning.theory.linear import LinearBarlowTwins
from stepwise_lightning.theory.moments import check_view_shapes
from stepwise_lightning.theory.process_group import process_group

Kernel = Callable[[Tensor, Tensor], Tensor]
# Eigenvalues below this fraction of the largest count as zero.
_ZERO = 1e-12
# Names in the file of a saved model, and attributes.
_FITTED = {
    "eigenvalues": "eigenvalues_", "coefficients": "coefficients_", "residuals": "residuals_", "views": "_views"
}  # fmt: skip


class ContrastiveKernelPCA(Estimator):
    r"""The embedding that kernel Barlow Twins learns from small initialisation, and its trajectory.

    The model minimises ‖C − I_d‖²_F, C = (1/2n) Σ_i (f(x_i) f(x'_i)ᵀ + f(x'_i) f(x_i)ᵀ), over functions of the kernel's
    Hilbert space. From small initialisation it learns the top eigenfunctions of the contrastive kernel one by one, and
    converges to f_j(x) = γ_j^{−1/2} Σ_i β_ij K(z_i, x), up to a rotation of the embedding.

    Block Lanczos iteration computes the eigenpairs from products with K̃, also for a singular K̃ (identical crops); up to
    300 pairs, a dense eigendecomposition on the range of K̃ is used.

    Args:
        kernel: any callable ``kernel(x, y)`` of (k, …) and (l, …) that returns (k, l), symmetric and positive
            semi-definite, see :mod:`stepwise_lightning.theory.kernels`; bind its arguments with ``functools.partial``.
        n_components: d, number of modes.
        max_bytes: memory for kernel values, per process. The kernel matrix is stored if half of it, 16 n² bytes divided
            by the number of processes, fits; otherwise it is recomputed in tiles at each iteration.
        tolerance: residual at which the iteration stops, relative to γ_1; the relative error of the eigenvalues is
            about its square.
        progress: show the progress of long fits on standard error: a bar on a terminal, otherwise lines.

    Attributes (after ``fit``):
        eigenvalues_: γ_1 … γ_d, (d,).
        coefficients_: β, (2n, d), the first n rows for X; signs make the largest |f_j| on Z positive.
        residuals_: ‖A β_j − γ_j β_j‖ in the K̃ norm, A the operator, (d,).

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from stepwise_lightning.theory import ContrastiveKernelPCA, rbf_kernel
        >>> angles = torch.arange(60) * 0.1  # two nearby views of each point of a circle
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
        if not callable(kernel) or isinstance(kernel, torch.nn.Module):
            got = repr(kernel) if isinstance(kernel, str) else type(kernel).__name__
            raise UserError(
                f"kernel must be a function kernel(x, y), got {got}: use linear_kernel, rbf_kernel, laplace_kernel, "
                "relu_ntk or EmpiricalNTK(module) of stepwise_lightning.theory"
            )
        if n_components < 1:
            raise UserError(f"n_components must be at least 1, got {n_components}")
        if not 0 < tolerance < 1:
            raise UserError(f"tolerance must lie between 0 and 1, got {tolerance}")
        self.kernel, self.n_components, self.max_bytes = kernel, n_components, max_bytes
        self.tolerance, self.progress = tolerance, progress

    def __repr__(self) -> str:
        fitted = f"fitted on {len(self._views) // 2} pairs" if hasattr(self, "eigenvalues_") else "not fitted"
        return f"ContrastiveKernelPCA(kernel={function_name(self.kernel)}, n_components={self.n_components}, {fitted})"

    def fit(self, x1: TensorLike, x2: TensorLike, operator: type[KernelOperator] = KernelOperator) -> Self:
        """Compute the top modes of pairs of views.

        Args:
            x1: first views, (n, …), tensor or array, passed to the kernel as tensors.
            x2: second views, of the same shape.
            operator: class of the kernel matrix; subclasses can count or time its products.

        Raises:
            ValueError: views that differ in shape, are empty, complex or not finite; a kernel matrix of wrong shape,
                zero, complex, of narrow integers, not finite or not symmetric; fewer positive modes than
                ``n_components``; ``max_bytes`` too small for one tile of the kernel matrix; calls that differ between
                ranks.

        """
        group, x1, x2 = process_group(), as_tensor(x1, "the first views"), as_tensor(x2, "the second views")
        group.check_same_call("ContrastiveKernelPCA.fit", x1, x2, self.n_components, self.max_bytes, self.tolerance)
        self._views = torch.cat(group.run_or_raise_everywhere(lambda: _validated_views(x1, x2)))
        kernel_matrix = operator(self.kernel, self._views, self.max_bytes, self.progress)
        eigenvalues, coefficients, residuals = top_eigenpairs(kernel_matrix, self.n_components, self.tolerance)
        positive = int((eigenvalues > _ZERO * eigenvalues.abs().max()).sum())
        if positive < self.n_components:
            raise UserError(
                f"n_components must be 1 to {positive}, the number of positive modes of these {len(x1)} pairs under "
                f"this kernel, got {self.n_components}"
                if positive
                else "these pairs have no positive mode under this kernel: check that the views of a pair match"
            )
        # f_j on a view is proportional to β_j on the other view of the pair; the largest entries have the same sign.
        peaks = coefficients.gather(0, coefficients.abs().argmax(0, keepdim=True)).sign()
        self.eigenvalues_, self.coefficients_, self.residuals_ = eigenvalues, coefficients * peaks, residuals
        return self

    def fit_transform(self, x1: TensorLike, x2: TensorLike) -> tuple[Tensor, Tensor]:
        """Fit, and return the final embeddings of both views, (n, d) each."""
        self.fit(x1, x2)
        return self.transform(x1), self.transform(x2)

    def transform(self, x: TensorLike) -> Tensor:
        """Return the final embeddings γ_j^{−1/2} Σ_i β_ij K(z_i, x) of (k, …) points, (k, d)."""
        return self._eigenfunctions(x) / self.eigenvalues_.sqrt()

    def transform_at(self, x: TensorLike, t: TensorLike, initial_singular_values: TensorLike) -> Tensor:
        """Return the embeddings of points (k, …) at time ``t``, s_j(t) Σ_i β_ij K(z_i, x), see :meth:`trajectory`.

        Returns:
            (k, d) for a scalar ``t``, (T, k, d) for ``t`` of shape (T,).

        """
        singular_values = self.trajectory(initial_singular_values).singular_values(t)
        return self._eigenfunctions(x) * singular_values.unsqueeze(-2)

    def initial_singular_values(self, f1: TensorLike, f2: TensorLike) -> Tensor:
        """Return s_j(0), (d,), for initial embeddings ``f1``, ``f2`` of the fitted pairs, (n, d') each with d' ≥ d.

        In the basis of the eigenfunctions the start is W(0) V = Fᵀ β, F = [f1; f2], and its QR decomposition gives
        s_j(0) = |R_jj|, as for :class:`LinearBarlowTwins`. The embeddings need not lie in the span of the kernel; only
        their projection enters. With a network's tangent kernel, its initial embeddings predict its step times.

        Raises:
            ValueError: called before ``fit``; embeddings of another shape, or not finite.

        """
        self._check_fitted()
        f1, f2 = (as_float64(f, "initial embeddings").detach().to(self.coefficients_.device) for f in (f1, f2))
        if f1.shape != f2.shape or f1.ndim != 2 or 2 * len(f1) != len(self._views) or f1.shape[1] < self.n_components:
            raise UserError(
                f"initial embeddings must have shape ({len(self._views) // 2}, at least {self.n_components}) for each "
                f"view, got {tuple(f1.shape)} and {tuple(f2.shape)}"
            )
        f = torch.cat([f1, f2])
        check_finite(f, "the initial embeddings", "check the model")
        return torch.linalg.qr(f.T @ self.coefficients_, mode="r").R.diagonal().abs()

    def trajectory(self, initial_singular_values: TensorLike) -> LinearBarlowTwins:
        """Return the linear model in the basis of the eigenfunctions, where Γ is diagonal, from s_j(0), (d,), on.

        Raises:
            ValueError: called before ``fit``; values of another shape, or negative.

        """
        self._check_fitted()
        start = as_float64(initial_singular_values, "initial_singular_values").to(self.eigenvalues_.device)
        if start.shape != self.eigenvalues_.shape or not (start >= 0).all():
            raise UserError(
                f"initial_singular_values must be {self.n_components} values ≥ 0, got {initial_singular_values!r}"
            )
        return LinearBarlowTwins(torch.diag(self.eigenvalues_), torch.diag(start))

    def embedding_eigenvalues(self, t: TensorLike, initial_singular_values: TensorLike) -> Tensor:
        """Return :meth:`LinearBarlowTwins.embedding_eigenvalues` of :meth:`trajectory`."""
        return self.trajectory(initial_singular_values).embedding_eigenvalues(t)

    def step_times(self, initial_singular_values: TensorLike) -> Tensor:
        """Return the step times τ_j = −log(s_j(0)² γ_j) / 8γ_j, (d,), the attribute of :meth:`trajectory`."""
        return self.trajectory(initial_singular_values).step_times

    def contrastive_kernel(self, x: TensorLike, y: TensorLike) -> Tensor:
        """Return k_Γ(x, y) = (1/2n) Σ_i [K(x, x_i) K(x'_i, y) + K(x, x'_i) K(x_i, y)], (k, l)."""
        self._check_fitted()
        left, right = (self._kernel(points, self._views) for points in (x, y))
        half = len(self._views) // 2
        return (left[:, :half] @ right[:, half:].T + left[:, half:] @ right[:, :half].T) / (2 * half)

    def loss(self, x1: TensorLike, x2: TensorLike) -> Tensor:
        """Return ‖C − I_d‖²_F of the final embeddings on pairs of views, (n, …) each; 0 on the fitted pairs."""
        f1, f2 = (self.transform(view) for view in _validated_views(x1, x2))
        c = f1.T @ f2 / len(f1)
        return ((c + c.T) / 2 - torch.eye(self.n_components).to(c)).square().sum()

    def save(self, path: str | Path) -> None:
        """Save the attributes of a fitted model as plain tensors, without the kernel."""
        self._check_fitted()
        torch.save({name: getattr(self, attribute) for name, attribute in _FITTED.items()}, path)

    @classmethod
    def load(cls, path: str | Path, kernel: Kernel, device: torch.device | str = "cpu") -> Self:
        """Load a fitted model from the file of :meth:`save`, saved on any device. Pass the kernel of the fit.

        ``device`` is the device of the loaded model; the CPU if that device has no float64.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is damaged, or not a saved model. No code in the file is executed.

        """
        try:
            saved = torch.load(path, map_location=float64_device(device), weights_only=True)
        except OSError:
            raise
        except Exception as error:  # torch and its unpickler raise many types
            kind = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"cannot load a ContrastiveKernelPCA from {str(path)!r} ({kind}): save it again") from error
        if not _is_fitted(saved):
            raise UserError(f"{str(path)!r} does not hold a fitted ContrastiveKernelPCA: save it again")
        model = cls(kernel, len(saved["eigenvalues"]))
        for name, attribute in _FITTED.items():
            setattr(model, attribute, saved[name])
        return model

    def _check_fitted(self) -> None:
        if not hasattr(self, "eigenvalues_"):
            raise UserError("this ContrastiveKernelPCA is not fitted: call fit(x1, x2) first")

    def _eigenfunctions(self, x: TensorLike) -> Tensor:
        self._check_fitted()
        x = as_tensor(x, "the points")
        side = KernelOperator.tile_size(self.max_bytes, self._views)
        parts = list(zip(self._views.split(side), self.coefficients_.split(side), strict=True))

        def values(points: Tensor) -> Tensor:
            return torch.cat([sum(self._kernel(rows, views) @ b for views, b in parts) for rows in points.split(side)])

        group = process_group()
        group.check_same_call("ContrastiveKernelPCA.transform", x, self.coefficients_)
        return group.map_rows(values, x)

    def _kernel(self, x: TensorLike, views: Tensor) -> Tensor:
        x = as_tensor(x, "the points")
        check_real(x, "the points")
        x, views = _common_dtype(x.to(views.device), views)
        return as_float64(self.kernel(x, views), "the kernel").to(self.coefficients_.device)


def _validated_views(x1: TensorLike, x2: TensorLike) -> tuple[Tensor, Tensor]:
    x1, x2 = as_tensor(x1, "the first views"), as_tensor(x2, "the second views")
    check_view_shapes(x1, x2)
    for name, x in (("first", x1), ("second", x2)):
        check_real(x, f"the {name} views")
        check_finite(x, f"the {name} views")
    device = float64_device(x1.device)
    return _common_dtype(x1.to(device), x2.to(device))


def _common_dtype(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return both tensors unchanged if they have the same type, else as float64, which holds the values of both."""
    return (x, y) if x.dtype == y.dtype else (x.double(), y.double())


def _is_fitted(saved: Any) -> bool:
    """Return True for the contents of a file of :meth:`ContrastiveKernelPCA.save`."""
    if not isinstance(saved, dict) or not all(isinstance(saved.get(name), Tensor) for name in _FITTED):
        return False
    eigenvalues, *_, views = tensors = [saved[name] for name in _FITTED]
    n, d, numbers = len(views) if views.ndim > 1 else 0, eigenvalues.numel(), tensors[:3]
    if n % 2 or not n * d or [tuple(tensor.shape) for tensor in numbers] != [(d,), (n, d), (d,)]:
        return False
    finite = all(not tensor.is_complex() and bool(tensor.isfinite().all()) for tensor in tensors)
    return finite and all(tensor.dtype == torch.float64 for tensor in numbers) and bool((eigenvalues > 0).all())
