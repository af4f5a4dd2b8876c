r"""Learning trajectories of linear Barlow Twins from small initialisation, in closed form.

Source: Simon et al., *On the Stepwise Nature of Self-Supervised Learning*, ICML 2023, arXiv 2303.15438 ("the paper").
The uniform form, finite steps and crossing times are derived here.

Legend
    n           number of positive pairs (x_i, x'_i), each in R^m
    W (d, m)    weights; the embedding of x is W x
    Γ (m, m)    feature cross-correlation of the two views, eigenvalues γ_1 ≥ γ_2 ≥ …, eigenvectors V
    C (d, d)    W Γ Wᵀ, the embeddings' cross-correlation, eigenvalues λ_1 ≥ … ≥ λ_d
    s_j         singular values of W for a start aligned with V
    η           learning rate; time t = η × number of gradient steps

The model minimises ‖C − I‖²_F by gradient flow, dW/dt = −4 (W Γ Wᵀ − I) W Γ.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from stepwise_lightning.errors import UserError
from stepwise_lightning.precision import TensorLike, as_float64, as_tensor
from stepwise_lightning.theory.graded_matrices import jacobi_eigenvalues, pencil_eigenvalues, row_echelon

Method = Literal["uniform", "qr"]

# Replaces t = ∞, to avoid 0 × ∞ and ∞ − ∞.
_INFINITE_TIME = 1e280
# Largest (times × m) array of the uniform form: 32 MB in float64.
_MAX_ELEMENTS = 2**22


class LinearBarlowTwins:
    r"""Training trajectory of linear Barlow Twins in closed form.

    **The paper's form** (``singular_values``, ``weights``, ``method="qr"``) is exact for an *aligned* start
    W(0) = U S(0) V_{≤d}ᵀ: W(t) = U S(t) V_{≤d}ᵀ with s_j(t) = [γ_j + (s_j(0)⁻² − γ_j) e^{−8 γ_j t}]^{−1/2}, for every
    sign of γ. For any other start, s_j(0) = R_jj of the QR decomposition W(0) V_{≤d} = U R. This is the limit of small
    starts, with an error ~ α^{1 − γ_{j+1}/γ_j} for weights of scale α: it fails where neighbouring eigenvalues are
    nearly equal, see ``neighbour_overlap``.

    **The uniform form** (the default) needs no gaps. With Δ = W(0) Γ (e^{8Γt} − 1) W(0)ᵀ, positive semi-definite for
    every Γ, the eigenvalues of C are approximated by the eigenvalues of (I+Δ)^{−1/2} (C(0)+Δ) (I+Δ)^{−1/2}. It is exact
    at t = 0, at t = ∞, for an aligned start of any size, and when all γ are equal; for a generic start its error
    vanishes with the start. Scales are kept as logarithms, and the eigenvalues have high *relative* accuracy.

    **Finite steps.** With ``learning_rate``, both forms describe gradient descent instead of gradient flow. The paper's
    form becomes the exact recursion s ← s + 4ηγ s (1 − γ s²), iterated round(t/η) times. In the uniform form e^{4γt}
    becomes (1 + 4ηγ)^{t/η}, and the odds λ/(1−λ) are multiplied by ((1−λ(0))/(1−λ))^{6ηγ_j}, with an error of second
    order in ηγ_1.

    All arithmetic is float64, on the device of ``gamma``, or on the CPU if that device has no float64.

    Args:
        gamma: Γ, (m, m), symmetric, with eigenvalues of any sign. See :func:`feature_cross_correlation`.
        weights0: W(0), (d, m). If d exceeds the number of positive eigenvalues, the surplus is never learned.
        learning_rate: η > 0 for finite steps; None for gradient flow.

    Attributes:
        eigenvalues: γ_1 … γ_d, (d,), descending (zeros beyond m).
        eigenvectors: V_{≤d}, (m, d), each with its largest entry positive.
        initial_singular_values: s_j(0) = R_jj ≥ 0, (d,).
        rotation: U, (d, d), orthogonal.
        step_times: τ_j = −log(s_j(0)² γ_j) / (8 γ_j), (d,), at which λ_j reaches ½ in the paper's form (exactly
            1/(2 − s_j(0)² γ_j)); infinite for modes that are never learned. With ``learning_rate``, 8γ is replaced by
            2 log(1 + 4ηγ)/η.
        neighbour_overlap: (d,), the larger of (s_j γ_j^{1/2})^{1 − γ_{j+1}/γ_j} over the two gaps of a mode: the share
            of the neighbour mixed in when the mode rises. Above ~0.1 the QR step times are unreliable.
        learning_rate: η or None.

    Example:
        >>> import torch
        >>> from stepwise_lightning.theory import LinearBarlowTwins
        >>> model = LinearBarlowTwins(torch.diag(torch.tensor([1.0, 0.5, 0.25])), 1e-3 * torch.eye(3))
        >>> [round(time, 2) for time in model.step_times.tolist()]
        [1.73, 3.63, 7.6]
        >>> [round(value, 2) for value in model.embedding_eigenvalues(5.0).tolist()]
        [1.0, 1.0, 0.01]
        >>> round(float(model.loss(5.0)), 2)  # of the third mode alone
        0.99

    Raises:
        ValueError: wrong shapes, complex or non-finite values, Γ not symmetric, d < 1, or a learning rate that is not
            positive or not below the stability limit 1/(4γ_1), γ_1 the largest eigenvalue of Γ in magnitude.

    """

    def __init__(self, gamma: TensorLike, weights0: TensorLike, learning_rate: float | None = None) -> None:
        gamma, weights0 = as_tensor(gamma, "gamma"), as_tensor(weights0, "weights0")
        precision = torch.finfo(gamma.dtype).eps if gamma.is_floating_point() else 0.0
        gamma, weights0 = _validated(gamma, weights0)
        spectrum, vectors = (values.flip(-1) for values in torch.linalg.eigh(gamma))  # descending
        noise = 4 * len(spectrum) ** 0.5 * precision * spectrum.abs().max()
        self._spectrum = torch.where(spectrum.abs() <= noise, 0.0, spectrum)
        vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
        self.learning_rate = self._validated_rate(learning_rate)

        d, m = weights0.shape
        projected = weights0 @ vectors  # W(0) V, (d, m)
        missing = max(d - m, 0)
        self.eigenvalues = pad(self._spectrum[:d], (0, missing))
        self.eigenvectors = pad(vectors[:, :d], (0, missing)).contiguous()

        q, r = torch.linalg.qr(pad(projected[:, :d], (0, missing)))
        signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(q)
        self.rotation = q * signs
        self.initial_singular_values = r.diagonal() * signs
        self.step_times = self._step_times()
        self.neighbour_overlap = self._neighbour_overlap()

        # For the uniform form: W(0) V in a basis in which row i begins at the i-th fastest independent mode.
        self._rows, self._pivots = row_echelon(projected)
        self._cross_correlation0 = (self._rows * self._spectrum) @ self._rows.T

    def __repr__(self) -> str:
        d, m = len(self.eigenvalues), len(self.eigenvectors)
        return f"LinearBarlowTwins(gamma=({m}, {m}), weights0=({d}, {m}), learning_rate={self.learning_rate})"

    def singular_values(self, t: TensorLike) -> Tensor:
        """Return s_j(t) of the paper's form, (d,) for a scalar ``t``, (T, d) for ``t`` of shape (T,).

        As t → ∞, s_j → γ_j^{−1/2} for γ_j > 0, s_j(0) for γ_j = 0, and 0 for γ_j < 0. The finite-step recursion takes
        time proportional to min(steps, 40/(ηγ_j)).
        """
        times, scalar = self._times(t)
        finite = self.learning_rate is not None
        values = self._recursion_singular_values(times) if finite else self._flow_singular_values(times)
        return values[0] if scalar else values

    def embedding_eigenvalues(self, t: TensorLike, method: Method = "uniform") -> Tensor:
        """Return the eigenvalues of C at time ``t``: (d,) for a scalar ``t``, (T, d) for ``t`` of shape (T,).

        Args:
            t: learning rate × steps, ≥ 0; may be infinite. A ValueError is raised for other values and shapes.
            method: ``"uniform"`` (in descending order) or ``"qr"`` (the paper's form, in the order of γ).

        """
        if method == "qr":
            return self.eigenvalues * self.singular_values(t) ** 2
        if method != "uniform":
            raise UserError(f"method must be 'uniform' or 'qr', got {method!r}")
        times, scalar = self._times(t)
        chunks = times.split(max(1, _MAX_ELEMENTS // len(self._spectrum)))
        values = torch.cat([self._uniform_eigenvalues(chunk) for chunk in chunks])
        return values[0] if scalar else values

    def loss(self, t: TensorLike, method: Method = "uniform") -> Tensor:
        """Return ‖C − I‖²_F = Σ_j (1 − λ_j)² at time ``t``, a scalar or (T,); its limit is d − #{γ_j > 0}."""
        return (1 - self.embedding_eigenvalues(t, method)).square().sum(-1)

    def weights(self, t: TensorLike) -> Tensor:
        """Return W(t) = U S(t) V_{≤d}ᵀ of the paper's form: (d, m), or (T, d, m) for ``t`` of shape (T,)."""
        return (self.rotation * self.singular_values(t).unsqueeze(-2)) @ self.eigenvectors.T

    def crossing_times(self, level: float = 0.5) -> Tensor:
        """Return the times at which the eigenvalues of C, by the uniform form, reach ``level``, (d,).

        Zero for eigenvalues that start above ``level``, infinite for those that never reach it; nine digits. Raises a
        ValueError unless 0 < ``level`` < 1.
        """
        if not 0 < level < 1:
            raise UserError(f"level must lie between 0 and 1, the limits of the eigenvalues, got {level}")
        reached = self.embedding_eigenvalues(math.inf) > level
        low = torch.zeros_like(self.eigenvalues)
        high = torch.full_like(low, 1 / float(self._spectrum[0]) if self._spectrum[0] > 0 else 1.0)
        while (short := reached & (self.embedding_eigenvalues(high).diagonal() < level)).any():
            high = torch.where(short, 2 * high, high)
        fractions = torch.linspace(0, 1, 33).to(low)
        for _ in range(6):  # divide each interval by 32: 32⁶ = 10⁹
            grid = low[:, None] + fractions * (high - low)[:, None]
            values = self.embedding_eigenvalues(grid.flatten()).reshape(*grid.shape, -1)
            below = (values.diagonal(dim1=0, dim2=2).mT[:, 1:-1] < level).sum(1, keepdim=True)
            low, high = grid.gather(1, below).squeeze(1), grid.gather(1, below + 1).squeeze(1)
        high = torch.where(self.embedding_eigenvalues(0.0) >= level, 0.0, high)
        return torch.where(reached, high, math.inf)

    def _validated_rate(self, learning_rate: float | None) -> float | None:
        if learning_rate is None:
            return None
        largest = self._spectrum.abs().max().item()
        limit = 1 / (4 * largest) if largest > 0 else math.inf
        if not 0 < learning_rate < limit:
            raise UserError(
                f"learning_rate must lie between 0 and the stability limit 1/(4γ_1) = {limit:.4g}, with γ_1 = "
                f"{largest:.4g} the largest eigenvalue of gamma in magnitude, got {learning_rate:g}"
            )
        return float(learning_rate)

    def _log_growth(self, gamma: Tensor, times: Tensor) -> Tensor:
        """Return the logarithm of the growth factor of |s|, e^{4γt} or (1 + 4ηγ)^{t/η}, (T, number of γ)."""
        eta = self.learning_rate
        rates = 4 * gamma if eta is None else (4 * eta * gamma).log1p() / eta
        return rates * times[:, None].clamp(max=_INFINITE_TIME)

    def _step_times(self) -> Tensor:
        gamma = self.eigenvalues
        learned = (gamma > 0) & (self.initial_singular_values > 0)
        rates = self._log_growth(gamma, torch.ones_like(gamma[:1]))[0]
        times = -(self.initial_singular_values.log() + gamma.log() / 2) / rates
        return torch.where(learned, times, math.inf)

    def _neighbour_overlap(self) -> Tensor:
        d = len(self.eigenvalues)
        gamma = pad(self._spectrum[: d + 1], (0, max(d + 1 - len(self._spectrum), 0)))
        start = (self.initial_singular_values * gamma[:d].clamp(min=0).sqrt()).clamp(max=1)
        ratio = torch.where(gamma[:d] > 0, gamma[1:] / gamma[:d], 1.0).clamp(min=0)
        below = torch.where(gamma[:d] > 0, start ** (1 - ratio), 0.0)
        return torch.where(gamma[:d] > 0, torch.maximum(below, pad(below[:-1], (1, 0))), 0.0)

    def _flow_singular_values(self, times: Tensor) -> Tensor:
        s0, gamma = self.initial_singular_values, self.eigenvalues
        exponent = -2 * self._log_growth(gamma, times)
        values = s0 / (exponent.exp() - gamma * s0**2 * torch.expm1(exponent)).sqrt()
        return torch.where(s0 == 0, 0.0, values)

    def _recursion_singular_values(self, times: Tensor) -> Tensor:
        assert self.learning_rate is not None
        counts, order = (times / self.learning_rate).round().sort()
        columns = [
            _recursion(s0, gamma, 4 * self.learning_rate * gamma, counts.tolist())
            for s0, gamma in zip(self.initial_singular_values.tolist(), self.eigenvalues.tolist(), strict=True)
        ]
        return torch.tensor(columns, dtype=torch.float64).T.to(self.eigenvalues)[order.argsort()]

    def _uniform_eigenvalues(self, times: Tensor) -> Tensor:
        """Return the eigenvalues of C by the uniform form, (T, d).

        With ε = 4ηγ, a finite step multiplies the odds λ/(1−λ) by (1 + ε)² e^{3ε²λ}, up to terms in ε³. In the flow
        log(odds) grows by 2ε per step: Σ 3ε²λ is (3ε/2) ∫ λ d log(odds) = (3ε/2) log((1−λ(0))/(1−λ)).
        """
        log_squares, start = 2 * self._log_growth(self._spectrum, times), self._cross_correlation0
        eigenvalues = pencil_eigenvalues(self._rows, self._pivots, self._spectrum, log_squares, start)
        if self.learning_rate is None:
            return eigenvalues
        gamma = self._spectrum[self._pivots]
        left0, left = 1 - jacobi_eigenvalues(start), 1 - eigenvalues
        ratio = torch.where(left0 == 0, 1.0, left / left0).clamp(min=0)
        return eigenvalues / (eigenvalues + left * ratio ** (6 * self.learning_rate * gamma))

    def _times(self, t: TensorLike) -> tuple[Tensor, bool]:
        times = as_float64(t, "t").to(self.eigenvalues.device)
        if times.ndim > 1:
            raise UserError(f"t must be a scalar or a vector of times, got shape {tuple(times.shape)}")
        if not (times >= 0).all():
            raise UserError("t must be ≥ 0 and not NaN: pass learning rate × number of steps")
        return times.reshape(-1), times.ndim == 0


def _validated(gamma: Tensor, weights0: Tensor) -> tuple[Tensor, Tensor]:
    if gamma.ndim != 2 or gamma.shape[0] != gamma.shape[1] or gamma.numel() == 0:
        raise UserError(f"gamma must be a square matrix (m, m), got shape {tuple(gamma.shape)}")
    if weights0.ndim != 2 or weights0.shape[1] != len(gamma) or len(weights0) < 1:
        raise UserError(
            f"weights0 must have shape (d, m) with d ≥ 1 and m = {len(gamma)} as gamma, got {tuple(weights0.shape)}"
        )
    tolerance = 1e-5 if gamma.dtype in (torch.float16, torch.bfloat16, torch.float32) else 1e-10
    gamma = as_float64(gamma, "gamma")
    weights0 = as_float64(weights0, "weights0").to(gamma.device)
    for name, values in (("gamma", gamma), ("weights0", weights0)):
        if not values.isfinite().all():
            raise UserError(f"{name} contains NaN or infinite values: check the inputs")
    if (gamma - gamma.T).abs().max() > tolerance * gamma.abs().max():
        raise UserError("gamma must be symmetric: use feature_cross_correlation(x1, x2)")
    return (gamma + gamma.T) / 2, weights0


def _recursion(s0: float, gamma: float, rate: float, counts: list[float]) -> list[float]:
    """Iterate s ← s + rate·s (1 − γ s²) and return s after each of ``counts`` steps (ascending, may be infinite).

    While |γ|s² < 1e-17 the recursion is linear to float64 precision and many steps are taken at once; the iteration
    ends at the fixed point.
    """
    linear = 1e-17
    values: list[float] = []
    done, s = 0.0, s0
    for count in counts:
        while done < count:
            x = gamma * s * s
            if abs(x) < linear or rate == 0:
                left = count - done
                if rate > 0 and x > 0:  # stay within the linear regime
                    left = min(left, max(1.0, math.floor(math.log(linear / x) / (2 * math.log1p(rate)))))
                s *= (1 + rate) ** left if rate != 0 else 1.0
                done += left
            elif abs(1 - x) < max(4e-15, 2e-16 / abs(rate)):  # converged to round-off
                done = count
            else:
                s += rate * s * (1 - x)
                done += 1
        values.append(s)
    return values
