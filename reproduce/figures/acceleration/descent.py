"""Descents of the analytical loss in full view: plain, with momentum, accelerated; and which is the fastest.

A model that is linear in features is descended in the eigenbasis of Γ, in float64, which is training on the pairs. What
is counted are optimiser steps until all d eigenvalues of C are at ½, and stay there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from stepwise_lightning import SpectrumRecord
from stepwise_lightning.acceleration import gate, lyapunov
from stepwise_lightning.theory import feature_cross_correlation

LEARNED = 0.5
STAYS = (
    1.5  # all modes are learned since all eigenvalues lie between ½ and this, as they have to for half as long again
)
RULES = ("plain", "momentum", "gate", "lyapunov")
# The control: features are divided by |Γ|, so that all modes are equally fast.
FEATURES = "features"


class Setting(NamedTuple):
    """How is descended: by which rule, and at which rate: relative to 1/(4γ_1), but for Lyapunov and the control."""

    rule: str
    rate: float
    momentum: float = 0.0


@dataclass
class Descent:
    """One descent: when all modes were learned, and what it has come to."""

    setting: Setting
    steps: float = math.nan
    """Since which all modes are learned; NaN if that has not been."""
    path: dict[int, Tensor] = field(default_factory=dict)
    """Eigenvalues of C by step, (d,) each, where they were kept."""
    final: Tensor = field(default_factory=lambda: torch.zeros(0))
    """Weights, or embeddings of both views, at the end."""

    def record(self) -> SpectrumRecord:
        """Return what was kept, with steps for times."""
        values, steps = torch.stack(list(self.path.values())), torch.tensor(list(self.path))
        return SpectrumRecord.of(steps.double(), values, (1 - values).square().sum(1), steps=steps)


class Watch:
    """Looks at C before each step, and says when to stop."""

    def __init__(self, descent: Descent, most: int) -> None:
        self.descent, self._most, self._since, self._step = descent, most, math.nan, -1

    def goes_on(self, c: Tensor) -> bool:
        """Take in C, (d, d), and return whether there is a reason to take another step."""
        self._step += 1
        if not c.isfinite().all() or float(c.abs().max()) > 100:
            return False
        values = torch.linalg.eigvalsh(c).flip(0)
        self.descent.path[self._step] = values
        if not (float(values[-1]) >= LEARNED and float(values[0]) <= STAYS):
            self._since = math.nan
        elif math.isnan(self._since):
            self._since = self._step
        if math.isnan(self._since):
            return self._step < self._most
        if self._step >= 1.5 * self._since:
            self.descent.steps = self._since
        return math.isnan(self.descent.steps)


def tuned(run: Callable[[Setting, int], Descent], settings: Iterable[Setting], most: int) -> Descent:
    """Return the descent that learns all modes in the fewest steps; of none that does, the first, with NaN steps.

    Args:
        run: from a setting, and the most steps to wait for all modes, to a descent.
        settings: those to choose from; the promising ones first, because those after them are cut short.
        most: steps that are waited for the first.

    """
    best: Descent | None = None
    for setting in settings:
        descent = run(setting, most)
        if best is None or descent.steps < best.steps or (math.isnan(best.steps) and descent.steps < math.inf):
            best = descent
        if not math.isnan(best.steps):
            most = int(best.steps)
    assert best is not None
    return best


@dataclass
class LinearProblem:
    """Features of pairs, in the eigenbasis of their Γ, and a small start."""

    gamma: Tensor
    """Eigenvalues of Γ, (m,), descending."""
    views: tuple[Tensor, Tensor]
    """Features in that basis, (n, m) each."""
    weights0: Tensor
    """(d, m)."""

    @classmethod
    def of(cls, h1: Tensor, h2: Tensor, dimensions: tuple[int, int], init_std: float, seed: int) -> LinearProblem:
        """Return it for features (n, m), with as many dimensions, between two numbers, as have the widest gap behind.

        Where γ_{d+1} is hardly smaller than γ_d, no descent of a usual length tells the two apart, and there is no
        top-d subspace to be found.
        """
        gamma, basis = torch.linalg.eigh(feature_cross_correlation(h1, h2))
        gamma, basis = gamma.flip(0), basis.flip(1)
        d = min(range(dimensions[0], dimensions[1] + 1), key=lambda d: float(gamma[d] / gamma[d - 1]))
        generator = torch.Generator().manual_seed(seed)
        weights0 = init_std * torch.randn(d, len(gamma), generator=generator, dtype=torch.float64)
        return cls(gamma, (h1 @ basis, h2 @ basis), weights0)

    def descend(self, setting: Setting, most: int) -> Descent:
        """Descend with all pairs at every step."""
        return self._descend(setting, most, lambda weights: (weights * self.gamma @ weights.T, weights * self.gamma))

    def descend_fresh(self, setting: Setting, most: int, batch_size: int, seed: int) -> Descent:
        """Descend with other pairs at every step, drawn at random; C that is looked at is that of all pairs."""
        generator = torch.Generator().manual_seed(seed)

        def batch(weights: Tensor) -> tuple[Tensor, Tensor]:
            drawn = torch.randint(len(self.views[0]), (batch_size,), generator=generator)
            h1, h2 = (h[drawn] for h in self.views)
            f1, f2 = h1 @ weights.T, h2 @ weights.T
            return (f1.T @ f2 + f2.T @ f1) / (2 * batch_size), (f1.T @ h2 + f2.T @ h1) / (2 * batch_size)

        return self._descend(setting, most, batch)

    def _descend(self, setting: Setting, most: int, moments: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Descent:
        """Descend ΔW = η P G; ``moments`` gives C and G = W Γ, as they are seen at a step."""
        watch = Watch(Descent(setting), most)
        weights, velocity = self.weights0, torch.zeros_like(self.weights0)
        unitless = setting.rule in ("lyapunov", FEATURES)
        rate = setting.rate if unitless else setting.rate / (4 * float(self.gamma[0]))
        while watch.goes_on(weights * self.gamma @ weights.T):
            c, g = moments(weights)
            if not c.isfinite().all():
                break
            p = _matrix(setting.rule, c, g)
            g = g / self.gamma.abs().clamp(min=1e-9 * float(self.gamma[0])) if setting.rule == FEATURES else g
            velocity = setting.momentum * velocity + p @ g
            weights = weights + rate * velocity
        watch.descent.final = weights
        return watch.descent


def _matrix(rule: str, c: Tensor, g: Tensor) -> Tensor:
    if rule == "gate":
        return gate(c)
    if rule == "lyapunov":
        return lyapunov(c, g @ g.T)
    return 4 * (torch.eye(len(c)).to(c) - c)
