"""Gradient descent on the analytical loss: plain, with momentum and accelerated, with a search for the best rate.

Training of a model that is linear in its features is computed in the eigenbasis of Γ, in float64. The result is the
number of optimiser steps until all d eigenvalues of C are above ½ and remain there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from stepwise_lightning import SpectrumRecord
from stepwise_lightning.modules.acceleration import gate, lyapunov
from stepwise_lightning.theory import feature_cross_correlation

# All modes are learned when all eigenvalues are in this range, and remain there for half as many steps again.
LEARNED, OVERSHOOT = 0.5, 1.5
RULES = ("plain", "momentum", "gate", "lyapunov")
# Baseline: IsoLoss, with a predictor.
ISOLOSS = "isoloss"
# Control: features divided by |Γ|, which makes all modes equally fast.
SCALED_FEATURES = "features"


class Setting(NamedTuple):
    """Update rule, learning rate (in units of 1/(4γ_1) except for Lyapunov and the control) and momentum."""

    rule: str
    rate: float
    momentum: float = 0.0


@dataclass
class Descent:
    """Result of one training run by gradient descent."""

    setting: Setting
    steps: float = math.nan
    """Step after which all modes are learned, or NaN."""
    path: dict[int, Tensor] = field(default_factory=dict)
    """Eigenvalues of C by step, (d,) each; of C_z C⁻¹ C_z for IsoLoss."""
    final: Tensor = field(default_factory=lambda: torch.zeros(0))
    """Weights, or embeddings of both views, at the end."""

    def record(self) -> SpectrumRecord:
        """Return the eigenvalues as a record with steps as times."""
        values, steps = torch.stack(list(self.path.values())), torch.tensor(list(self.path))
        return SpectrumRecord.of(steps.double(), values, (1 - values).square().sum(1), steps=steps)


class ConvergenceMonitor:
    """Record the eigenvalues of C before each step, and detect when all modes are learned."""

    def __init__(self, descent: Descent, max_steps: int) -> None:
        self.descent, self._max_steps, self._since, self._step = descent, max_steps, math.nan, -1

    def update(self, c: Tensor) -> bool:
        """Record C, (d, d), and return True if training should continue."""
        self._step += 1
        if not c.isfinite().all() or float(c.abs().max()) > 100:
            return False
        values = torch.linalg.eigvalsh(c).flip(0)
        self.descent.path[self._step] = values
        if not (float(values[-1]) >= LEARNED and float(values[0]) <= OVERSHOOT):
            self._since = math.nan
        elif math.isnan(self._since):
            self._since = self._step
        if math.isnan(self._since):
            return self._step < self._max_steps
        if self._step >= 1.5 * self._since:
            self.descent.steps = self._since
        return math.isnan(self.descent.steps)


def fastest_descent(run: Callable[[Setting, int], Descent], settings: Iterable[Setting], max_steps: int) -> Descent:
    """Return the descent with the fewest steps, or the first one if none learns all modes.

    Args:
        run: function of a setting and the maximum number of steps.
        settings: candidates, promising ones first: the best number of steps so far limits later candidates.
        max_steps: limit for the first candidate.

    """
    best: Descent | None = None
    for setting in settings:
        descent = run(setting, max_steps)
        if best is None or descent.steps < best.steps or (math.isnan(best.steps) and descent.steps < math.inf):
            best = descent
        if not math.isnan(best.steps):
            max_steps = int(best.steps)
    assert best is not None
    return best


@dataclass
class LinearProblem:
    """Features of the pairs in the eigenbasis of Γ, and small initial weights."""

    gamma: Tensor
    """Eigenvalues of Γ, (m,), descending."""
    views: tuple[Tensor, Tensor]
    """Features in that basis, (n, m) each."""
    weights0: Tensor
    """Initial weights, (d, m)."""

    @classmethod
    def from_features(
        cls, h1: Tensor, h2: Tensor, dimensions: tuple[int, int], init_std: float, seed: int
    ) -> LinearProblem:
        """Return the problem for features (n, m), with d chosen in a range at the smallest ratio γ_{d+1}/γ_d.

        At a ratio near 1, training of usual length does not separate the two modes, and the top-d subspace is not
        defined.
        """
        gamma, basis = torch.linalg.eigh(feature_cross_correlation(h1, h2))
        gamma, basis = gamma.flip(0), basis.flip(1)
        d = min(range(dimensions[0], dimensions[1] + 1), key=lambda d: float(gamma[d] / gamma[d - 1]))
        generator = torch.Generator().manual_seed(seed)
        weights0 = init_std * torch.randn(d, len(gamma), generator=generator, dtype=torch.float64)
        return cls(gamma, (h1 @ basis, h2 @ basis), weights0)

    def descend(self, setting: Setting, max_steps: int) -> Descent:
        """Train with all pairs at every step."""
        if setting.rule == ISOLOSS:
            return self._descend_isoloss(setting, max_steps)
        return self._descend(
            setting, max_steps, lambda weights: (weights * self.gamma @ weights.T, weights * self.gamma)
        )

    def descend_minibatches(self, setting: Setting, max_steps: int, batch_size: int, seed: int) -> Descent:
        """Train with a random batch at every step; the recorded C is computed from all pairs."""
        generator = torch.Generator().manual_seed(seed)

        def batch_moments(weights: Tensor) -> tuple[Tensor, Tensor]:
            indices = torch.randint(len(self.views[0]), (batch_size,), generator=generator)
            h1, h2 = (h[indices] for h in self.views)
            f1, f2 = h1 @ weights.T, h2 @ weights.T
            return (f1.T @ f2 + f2.T @ f1) / (2 * batch_size), (f1.T @ h2 + f2.T @ h1) / (2 * batch_size)

        return self._descend(setting, max_steps, batch_moments)

    def _descend_isoloss(self, setting: Setting, max_steps: int) -> Descent:
        """Train with the Euclidean IsoLoss and the predictor C_z = WΣWᵀ: ΔW = 4η (WΓ − C_z WΣ).

        Σ is the second moment of both views. C does not reach I: training ends at C = C_z², and the eigenvalues of
        C_z C⁻¹ C_z are recorded, which are 1 there. They are computed from W = L Q with orthonormal rows of Q, because
        the eigenvalues of C differ by more than the precision.
        """
        monitor = ConvergenceMonitor(Descent(setting), max_steps)
        sigma = sum(h.T @ h for h in self.views) / (2 * len(self.views[0]))
        rate, weights = setting.rate / (4 * float(self.gamma[0])), self.weights0
        while True:
            q, r = torch.linalg.qr(weights.T)
            moment, c = q.T @ (drive := sigma @ q), q.T @ (self.gamma[:, None] * q)
            if not monitor.update(r.T @ moment @ torch.linalg.solve(c, moment) @ r):
                monitor.descent.final = weights
                return monitor.descent
            weights = weights + 4 * rate * (weights * self.gamma - r.T @ moment @ r @ (drive @ r).T)

    def _descend(self, setting: Setting, max_steps: int, moments: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Descent:
        """Iterate ΔW = η P G; ``moments`` returns C and G = W Γ for the current weights."""
        monitor = ConvergenceMonitor(Descent(setting), max_steps)
        weights, velocity = self.weights0, torch.zeros_like(self.weights0)
        unitless = setting.rule in ("lyapunov", SCALED_FEATURES)
        rate = setting.rate if unitless else setting.rate / (4 * float(self.gamma[0]))
        while monitor.update(weights * self.gamma @ weights.T):
            c, g = moments(weights)
            if not c.isfinite().all():
                break
            p = _matrix(setting.rule, c, g)
            if setting.rule == SCALED_FEATURES:
                g = g / self.gamma.abs().clamp(min=1e-9 * float(self.gamma[0]))
            velocity = setting.momentum * velocity + p @ g
            weights = weights + rate * velocity
        monitor.descent.final = weights
        return monitor.descent


def _matrix(rule: str, c: Tensor, g: Tensor) -> Tensor:
    if rule == "gate":
        return gate(c)
    if rule == "lyapunov":
        return lyapunov(c, g @ g.T)
    return 4 * (torch.eye(len(c)).to(c) - c)
