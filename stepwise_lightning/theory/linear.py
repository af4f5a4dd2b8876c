r"""Exact learning trajectories of linear Barlow Twins from small initialisation.

Source: Simon et al., *On the Stepwise Nature of Self-Supervised Learning*, ICML 2023, arXiv 2303.15438.
What goes beyond the paper is marked so.

Legend
    n           number of positive pairs (x_i, x'_i), each in R^m
    W (d, m)    weights; the embedding of x is W x
    Γ (m, m)    feature cross-correlation of the two views, eigenvalues γ_1 ≥ γ_2 ≥ …, eigenvectors V
    C (d, d)    W Γ Wᵀ, the embeddings' cross-correlation, eigenvalues λ_1 ≥ … ≥ λ_d
    s_j         singular values of W for a start aligned with V
    η           learning rate; time t = η × number of gradient steps

The model minimises ‖C − I‖²_F, so gradient flow is dW/dt = −4 (W Γ Wᵀ − I) W Γ.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from stepwise_lightning.errors import UserError
from stepwise_lightning.precision import as_float64
from stepwise_lightning.theory.graded_matrices import jacobi_eigenvalues, pencil_eigenvalues, row_echelon

Method = Literal["uniform", "qr"]

# Stands for t = ∞, so that 0 × ∞ and ∞ − ∞ do not arise.
_FOREVER = 1e280

# Largest (times × m) array that the uniform form makes at once: 32 MB in float64.
_MAX_ELEMENTS = 2**22


class LinearBarlowTwins:
    r"""The training trajectory of linear Barlow Twins, in closed form.

    ========================================  =============================================================
    ``embedding_eigenvalues(t)``              eigenvalues of C by the *uniform* form (beyond the paper)
    ``embedding_eigenvalues(t, "qr")``        eigenvalues of C by the paper's form
    ``singular_values(t)``, ``weights(t)``    the paper's form
    ========================================  =============================================================

    **The paper's form** is exact for an *aligned* start W(0) = U S(0) V_{≤d}ᵀ:
    W(t) = U S(t) V_{≤d}ᵀ with s_j(t) = [γ_j + (s_j(0)⁻² − γ_j) e^{−8 γ_j t}]^{−1/2}, here written so that it holds for
    every sign of γ and cannot overflow. Any other start enters through the QR decomposition W(0) V_{≤d} = U R with
    s_j(0) = R_jj. That is right in the limit of a small start only, with an error ~ α^{1 − γ_{j+1}/γ_j} for weights
    of scale α, so not where neighbouring eigenvalues are nearly equal: see ``neighbour_overlap``.

    **The uniform form** (beyond the paper) needs no gaps. With Δ = W(0) Γ (e^{8Γt} − 1) W(0)ᵀ, which is positive
    semi-definite for every Γ, the eigenvalues of C are taken as those of (I+Δ)^{−1/2} (C(0)+Δ) (I+Δ)^{−1/2}. It is
    exact at t = 0, at t = ∞, for every aligned start of any size, and when all γ are equal; for a generic start its
    error vanishes with the start. The factors span hundreds of orders of magnitude: scales are kept as logarithms
    and the eigenvalues found with high *relative* accuracy.

    **Finite steps.** Given ``learning_rate``, both forms describe gradient descent in place of the flow. The paper's
    form becomes the exact recursion s ← s + 4ηγ s (1 − γ s²), iterated for round(t/η) steps. In the uniform form
    e^{4γt} becomes (1 + 4ηγ)^{t/η}, and the odds λ/(1−λ) are multiplied by ((1−λ(0))/(1−λ))^{6ηγ_j}, which corrects
    the growth rate as a mode saturates and leaves an error of second order in ηγ_1.

    Args:
        gamma: Γ, (m, m), symmetric; any sign of eigenvalues. See :func:`feature_cross_correlation`.
        weights0: W(0), (d, m). d may exceed the number of positive eigenvalues: the surplus is never learned.
        learning_rate: η > 0 for the finite-step form; None for gradient flow.

    Attributes:
        eigenvalues: γ_1 … γ_d, (d,), descending (zeros beyond m).
        eigenvectors: V_{≤d}, (m, d), each with its largest entry positive.
        initial_singular_values: s_j(0) = R_jj ≥ 0, (d,).
        rotation: U, (d, d), orthogonal.
        step_times: τ_j = −log(s_j(0)² γ_j) / (8 γ_j), (d,): when λ_j reaches ½ in the paper's form (exactly
            1/(2 − s_j(0)² γ_j)); infinite for modes that are never learned. With ``learning_rate``, 8γ is replaced by
            2 log(1 + 4ηγ)/η.
        neighbour_overlap: (d,), the larger of (s_j γ_j^{1/2})^{1 − γ_{j+1}/γ_j} over a mode's two gaps: how much of
            the neighbour is mixed in when the mode rises. Above ~0.1 the QR step times cannot be trusted.
        learning_rate: η or None.

    All arithmetic is float64, on the device of ``gamma``, or on the CPU where that has no float64.

    Example:
        Three modes from a start of 10⁻³; each is learned at −log(s²γ)/8γ:

        >>> import torch
        >>> from stepwise_lightning.theory import LinearBarlowTwins
        >>> gamma, start = torch.diag(torch.tensor([1.0, 0.5, 0.25])), 1e-3 * torch.eye(3)
        >>> model = LinearBarlowTwins(gamma, start)
        >>> [round(time, 2) for time in model.step_times.tolist()]
        [1.73, 3.63, 7.6]
        >>> [round(value, 2) for value in model.embedding_eigenvalues(5.0).tolist()]
        [1.0, 1.0, 0.01]
        >>> round(float(model.loss(5.0)), 2)  # of the third mode alone
        0.99

    Raises:
        ValueError: wrong shapes, complex or non-finite values, Γ not symmetric, d < 1, or a learning rate that is not
            positive or at or above the stability limit 1/(4γ_1), γ_1 the largest eigenvalue of Γ in magnitude.

    """

    def __init__(self, gamma: Tensor, weights0: Tensor, learning_rate: float | None = None) -> None:
        precision = torch.finfo(gamma.dtype).eps if gamma.is_floating_point() else 0.0
        gamma, weights0 = _validated(gamma, weights0)
        spectrum, vectors = torch.linalg.eigh(gamma)
        spectrum, vectors = spectrum.flip(0), vectors.flip(1)  # descending
        noise = 4 * len(spectrum) ** 0.5 * precision * spectrum.abs().max()
        self._spectrum = torch.where(spectrum.abs() <= noise, 0.0, spectrum)
        peaks = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        vectors = vectors * peaks.sign()
        self.learning_rate = self._stable(learning_rate)

        d, m = weights0.shape
        projected = weights0 @ vectors  # W(0) V, (d, m)
        missing = max(d - m, 0)
        self.eigenvalues = torch.nn.functional.pad(self._spectrum[:d], (0, missing))
        self.eigenvectors = torch.nn.functional.pad(vectors[:, :d], (0, missing)).contiguous()

        q, r = torch.linalg.qr(torch.nn.functional.pad(projected[:, :d], (0, missing)))
        signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(q)
        self.rotation = q * signs
        self.initial_singular_values = r.diagonal() * signs
        self.step_times = self._step_times()
        self.neighbour_overlap = self._neighbour_overlap()

        # For the uniform form: W(0) V in a basis where row i first sees the i-th fastest independent mode.
        self._rows, self._pivots = row_echelon(projected)
        self._cross_correlation0 = (self._rows * self._spectrum) @ self._rows.T

    def singular_values(self, t: Tensor | float) -> Tensor:
        """Return s_j(t) of the paper's form, (d,) for a scalar ``t``, (T, d) for ``t`` of shape (T,).

        Limits: γ > 0 ends at γ^{−1/2}, γ = 0 stays, γ < 0 decays to 0. The finite-step recursion takes time
        proportional to min(steps, 40/(ηγ_j)).

        Raises:
            ValueError: ``t`` is negative, NaN, or has more than one dimension.

        """
        times, scalar = self._times(t)
        if self.learning_rate is None:
            values = self._flow_singular_values(times)
        else:
            values = self._recursion_singular_values(times)
        return values[0] if scalar else values

    def embedding_eigenvalues(self, t: Tensor | float, method: Method = "uniform") -> Tensor:
        """Return the eigenvalues of C at time ``t``: (d,) for a scalar ``t``, (T, d) for ``t`` of shape (T,).

        Args:
            t: learning rate × steps, ≥ 0; may be infinite.
            method: ``"uniform"`` (descending order) or ``"qr"`` (the paper's; in the order of γ).

        Raises:
            ValueError: an unknown method, or a bad ``t``.

        """
        if method == "qr":
            return self.eigenvalues * self.singular_values(t) ** 2
        if method != "uniform":
            raise UserError(f"method must be 'uniform' or 'qr', got {method!r}")
        times, scalar = self._times(t)
        chunk = max(1, _MAX_ELEMENTS // len(self._spectrum))
        values = torch.cat([self._uniform_eigenvalues(part) for part in times.split(chunk)])
        return values[0] if scalar else values

    def loss(self, t: Tensor | float, method: Method = "uniform") -> Tensor:
        """Return ‖C − I‖²_F = Σ_j (1 − λ_j)² at time ``t``, a scalar or (T,). It ends at d − (number of positive γ)."""
        return (1 - self.embedding_eigenvalues(t, method)).square().sum(-1)

    def weights(self, t: Tensor | float) -> Tensor:
        """Return W(t) = U S(t) V_{≤d}ᵀ of the paper's form: (d, m), or (T, d, m) for ``t`` of shape (T,)."""
        return (self.rotation * self.singular_values(t).unsqueeze(-2)) @ self.eigenvectors.T

    def crossing_times(self, level: float = 0.5) -> Tensor:
        """Return when each eigenvalue of C, by the uniform form, reaches ``level``: (d,), beyond the paper.

        Zero where it starts above, infinite where it never gets there. Solved by sections, to nine digits.

        Raises:
            ValueError: ``level`` is not between 0 and 1.

        """
        if not 0 < level < 1:
            raise UserError(f"level must lie between 0 and 1 (the eigenvalues' limits), got {level}")
        final = self.embedding_eigenvalues(math.inf)
        low = torch.zeros_like(final)
        positive = self._spectrum[self._spectrum > 0]
        high = torch.full_like(final, 1.0 / positive[0].item() if len(positive) else 1.0)
        unreached = final > level
        while (short := unreached & (self.embedding_eigenvalues(high).diagonal() < level)).any():
            high = torch.where(short, 2 * high, high)
        fractions = torch.linspace(0, 1, 33).to(low)
        for _ in range(6):  # 32 sections at a time: 32⁶ = 10⁹ in all
            grid = low[:, None] + fractions * (high - low)[:, None]
            values = self.embedding_eigenvalues(grid.flatten()).reshape(*grid.shape, -1)
            below = (values.diagonal(dim1=0, dim2=2).mT[:, 1:-1] < level).sum(1, keepdim=True)
            low, high = grid.gather(1, below).squeeze(1), grid.gather(1, below + 1).squeeze(1)
        high = torch.where(self.embedding_eigenvalues(0.0) >= level, 0.0, high)
        return torch.where(unreached, high, math.inf)

    def _stable(self, learning_rate: float | None) -> float | None:
        if learning_rate is None:
            return None
        largest = self._spectrum.abs().max().item()
        limit = 1 / (4 * largest) if largest > 0 else math.inf
        if not 0 < learning_rate < limit:
            raise UserError(
                f"learning rate {learning_rate:g} must lie between 0 and the stability limit 1/(4γ_1) = {limit:.4g}, "
                f"where γ_1 = {largest:.4g} is the largest eigenvalue of gamma in magnitude"
            )
        return float(learning_rate)

    def _log_growth(self, gamma: Tensor, times: Tensor) -> Tensor:
        """Return the logarithm of what e^{4γt} or (1 + 4ηγ)^{t/η} multiplies |s| by, (T, number of γ)."""
        if self.learning_rate is None:
            rates = 4 * gamma
        else:
            rates = (4 * self.learning_rate * gamma).log1p() / self.learning_rate
        return rates * times[:, None].clamp(max=_FOREVER)

    def _step_times(self) -> Tensor:
        gamma = self.eigenvalues
        learned = (gamma > 0) & (self.initial_singular_values > 0)
        rates = self._log_growth(gamma, torch.ones_like(gamma[:1]))[0]
        times = -(self.initial_singular_values.log() + gamma.log() / 2) / rates
        return torch.where(learned, times, math.inf)

    def _neighbour_overlap(self) -> Tensor:
        d = len(self.eigenvalues)
        gamma = torch.nn.functional.pad(self._spectrum[: d + 1], (0, max(d + 1 - len(self._spectrum), 0)))
        start = (self.initial_singular_values * gamma[:d].clamp(min=0).sqrt()).clamp(max=1)
        ratio = torch.where(gamma[:d] > 0, gamma[1:] / gamma[:d], 1.0).clamp(min=0)
        below = torch.where(gamma[:d] > 0, start ** (1 - ratio), 0.0)
        above = torch.nn.functional.pad(below[:-1], (1, 0))
        return torch.where(gamma[:d] > 0, torch.maximum(below, above), 0.0)

    def _flow_singular_values(self, times: Tensor) -> Tensor:
        s0, gamma = self.initial_singular_values, self.eigenvalues
        exponent = -2 * self._log_growth(gamma, times)
        values = s0 / (exponent.exp() - gamma * s0**2 * torch.expm1(exponent)).sqrt()
        return torch.where(s0 == 0, 0.0, values)

    def _recursion_singular_values(self, times: Tensor) -> Tensor:
        assert self.learning_rate is not None
        steps = (times / self.learning_rate).round()
        order = steps.argsort()
        counts = steps[order].tolist()
        columns = [
            _recursion(s0, gamma, 4 * self.learning_rate * gamma, counts)
            for s0, gamma in zip(self.initial_singular_values.tolist(), self.eigenvalues.tolist(), strict=True)
        ]
        values = torch.empty(len(counts), len(columns)).to(self.eigenvalues)
        values[order] = torch.tensor(columns, dtype=torch.float64).T.to(values)
        return values

    def _uniform_eigenvalues(self, times: Tensor) -> Tensor:
        log_squares = 2 * self._log_growth(self._spectrum, times)
        start = self._cross_correlation0
        return self._saturate(pencil_eigenvalues(self._rows, self._pivots, self._spectrum, log_squares, start))

    def _saturate(self, eigenvalues: Tensor) -> Tensor:
        """Multiply the odds λ/(1−λ) by ((1−λ(0))/(1−λ))^{6ηγ_j}: what finite steps change while a mode saturates.

        With ε = 4ηγ, one step of the recursion multiplies the odds by (1 + ε)² e^{3ε²λ}, up to terms in ε³. The flow's
        odds grow by 2ε a step, so that Σ 3ε²λ over the steps is (3ε/2) ∫ λ d log(odds) = (3ε/2) log((1−λ(0))/(1−λ)).
        """
        if self.learning_rate is None:
            return eigenvalues
        gamma = self._spectrum[self._pivots]
        start = 1 - jacobi_eigenvalues(self._cross_correlation0)
        left = 1 - eigenvalues
        ratio = torch.where(start == 0, 1.0, left / start).clamp(min=0)
        return eigenvalues / (eigenvalues + left * ratio ** (6 * self.learning_rate * gamma))

    def _times(self, t: Tensor | float) -> tuple[Tensor, bool]:
        times = as_float64(t, "t").to(self.eigenvalues.device)
        if times.ndim > 1:
            raise UserError(f"t must be a scalar or a vector of times, got shape {tuple(times.shape)}")
        if not (times >= 0).all():
            raise UserError("t must be ≥ 0 and not NaN: it is learning rate × number of steps")
        return times.reshape(-1), times.ndim == 0


def _validated(gamma: Tensor, weights0: Tensor) -> tuple[Tensor, Tensor]:
    if gamma.ndim != 2 or gamma.shape[0] != gamma.shape[1] or gamma.numel() == 0:
        raise UserError(f"gamma must be a square matrix (m, m), got shape {tuple(gamma.shape)}")
    if weights0.ndim != 2 or weights0.shape[1] != len(gamma) or len(weights0) < 1:
        raise UserError(
            f"weights0 must have shape (d, m) with d ≥ 1 and m = {len(gamma)} to match gamma, "
            f"got {tuple(weights0.shape)}"
        )
    tolerance = 1e-5 if gamma.dtype in (torch.float16, torch.bfloat16, torch.float32) else 1e-10
    gamma = as_float64(gamma, "gamma")
    weights0 = as_float64(weights0, "weights0").to(gamma.device)
    for name, values in (("gamma", gamma), ("weights0", weights0)):
        if not values.isfinite().all():
            raise UserError(f"{name} holds NaN or infinite values")
    if (gamma - gamma.T).abs().max() > tolerance * gamma.abs().max():
        raise UserError("gamma must be symmetric: use feature_cross_correlation(x1, x2)")
    return (gamma + gamma.T) / 2, weights0


def _recursion(s0: float, gamma: float, rate: float, counts: list[float]) -> list[float]:
    """Iterate s ← s + rate·s (1 − γ s²) and return s after each of ``counts`` steps (ascending, may be infinite).

    Where |γ|s² < 1e-17 the recursion is linear to float64 precision and is jumped over; at its fixed point it stops.
    """
    linear = 1e-17
    values: list[float] = []
    done, s = 0.0, s0
    for count in counts:
        while done < count:
            x = gamma * s * s
            if abs(x) < linear or rate == 0:
                left = count - done
                if rate > 0 and x > 0:  # stop short of the end of the linear regime
                    left = min(left, max(1.0, math.floor(math.log(linear / x) / (2 * math.log1p(rate)))))
                s *= (1 + rate) ** left if rate != 0 else 1.0
                done += left
            elif abs(1 - x) < max(4e-15, 2e-16 / abs(rate)):  # only round-off would change
                done = count
            else:
                s += rate * s * (1 - x)
                done += 1
        values.append(s)
    return values
