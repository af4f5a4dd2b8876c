r"""Training of a last linear layer on features that stay, simulated exactly, for all three losses (beyond the paper).

Legend
    n           pairs of a batch, with features h_i, h'_i in R^m
    W (d, m)    weights, z = W h the embedding; a bias is the weight of a feature that is one everywhere
    C, G        cross-correlation of the embeddings, derivative of the loss with respect to it
    Γ, Σ, D     moments of the features, see :class:`FeatureMoments`
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from stepwise_lightning.errors import UserError
from stepwise_lightning.precision import as_float64
from stepwise_lightning.theory.growth import growth_matrix, loss_settings
from stepwise_lightning.theory.layer_gradients import layer_gradient
from stepwise_lightning.theory.moments import FeatureMoments, checked_features

__all__ = ["LastLayer", "LayerTrajectory"]


@dataclass(frozen=True)
class LayerTrajectory:
    """How a last layer was trained."""

    steps: Tensor
    """(K,), the optimiser steps at which eigenvalues were taken."""
    eigenvalues: Tensor
    """(K, d), descending, float64; infinite from where the weights have diverged."""
    weight: Tensor
    """(d, m) after the last step; of projected features the part that lies in their span."""
    bias: Tensor | None
    """(d,) after the last step."""


class LastLayer:
    r"""A last linear layer, z = W h + b, whose features h stay what they are.

    :meth:`simulate` follows what ``torch.optim.SGD`` would do to it, to round-off. Barlow Twins and VICReg depend on
    moments of the features alone, so that a step takes O(d m²), whatever the number of pairs; SimCLR takes O(n² d).

    The gradients are those of :mod:`stepwise_lightning.theory.layer_gradients`.

    What a network's own features do while it trains is not in it: before training it is right about the first mode, and
    for Barlow Twins and SimCLR roughly about later ones.

    Args:
        loss: ``barlow_twins``, ``vicreg`` or ``simclr``.
        h1: features of the first views, (n, m), or in batches, (batches, n, m). Barlow Twins and VICReg descend the
            loss of the batches' mean moments, SimCLR goes through the batches in turn.
        h2: features of the second views.
        weight: W at the start, (d, m).
        bias: b at the start, (d,), or None for a layer without.
        num_components: project wide features on so many leading components of both views' uncentred second moment, the
            mean among them. Exact where it is their rank (at most 2n · batches); else see ``variance_left_out`` and
            ``rate_errors``. None: as they are.
        settings: the loss's own arguments, with its own defaults.

    Attributes:
        variance_left_out: share of the features' variance outside the components; 0 without a projection.

    Raises:
        ValueError: an unknown loss or setting, shapes that do not match, values that are not finite, or a number of
            components that is not between 1 and m.

    """

    def __init__(
        self,
        loss: str,
        h1: Tensor,
        h2: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        num_components: int | None = None,
        **settings: Any,
    ) -> None:
        self.loss, self.settings = loss, loss_settings(loss, settings)
        self._features = h1, h2 = checked_features(h1, h2)
        m = h1.shape[-1]
        if weight.ndim != 2 or weight.shape[1] != m or (bias is not None and bias.shape != weight.shape[:1]):
            raise UserError(
                f"weight must be (d, m) with m = {m} features, and bias (d,) or None, got {tuple(weight.shape)}"
                + (f" and {tuple(bias.shape)}" if bias is not None else "")
            )
        if num_components is not None and not 1 <= num_components <= m:
            raise UserError(f"num_components must lie between 1 and the {m} features, got {num_components}")
        self._basis = None if num_components is None else leading_components(h1, h2, num_components)
        self.variance_left_out = 0.0
        if self._basis is not None:
            whole = _variance(h1, h2)
            h1, h2 = h1 @ self._basis, h2 @ self._basis
            self.variance_left_out = max(1 - _variance(h1, h2) / whole, 0.0) if whole > 0 else 0.0
        self._has_bias = bias is not None
        self._weight0 = self._joined(weight, bias)
        if not self._weight0.isfinite().all():
            raise UserError("weight and bias must be finite: look at the checkpoint")
        if self._has_bias:
            h1, h2 = pad(h1, (0, 1), value=1.0), pad(h2, (0, 1), value=1.0)
        self._h1, self._h2 = h1, h2

    @cached_property
    def rate_errors(self) -> Tensor:
        """How much smaller the projection makes the growth rates of modes 1 … d, as shares of these: (d,).

        Never negative, by the interlacing of eigenvalues; 0 without a projection, NaN for modes that do not grow.
        """
        d = len(self._weight0)
        if self._basis is None:
            return self._weight0.new_zeros(d)
        growth = growth_matrix(self.loss, *self._features, d, **self.settings)
        rates = [torch.linalg.eigvalsh(h).flip(0)[:d] for h in (growth, self._basis.T @ growth @ self._basis)]
        whole, projected = (pad(r, (0, d - len(r))) for r in rates)
        return torch.where(whole > 0, 1 - projected / whole, math.nan)

    @torch.no_grad()
    def simulate(
        self,
        learning_rates: Sequence[float] | Tensor,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        velocity: Tensor | None = None,
        bias_velocity: Tensor | None = None,
        measured_at: Iterable[int] | None = None,
    ) -> LayerTrajectory:
        r"""Follow the steps v ← βv + ∇L + ωW, W ← W − ηv of ``torch.optim.SGD``, weights and bias alike.

        The eigenvalues are those of what a run of this loss is judged by, over all pairs: C of Barlow Twins (centred if
        the loss is, or normalises), the covariance for VICReg, the normalised covariance for SimCLR.

        Args:
            learning_rates: η of each step, (T,): ``[0.002] * 600``, or any schedule.
            momentum: β in [0, 1).
            weight_decay: ω ≥ 0.
            velocity: v of the weights at the start, (d, m), a running optimiser's ``momentum_buffer``; None for zero.
            bias_velocity: that of the bias, (d,).
            measured_at: after how many steps, between 0 and T, to take eigenvalues; None for all. Those of SimCLR pass
                all pairs through the layer each time.

        Raises:
            ValueError: a setting out of range, or of another shape.

        """
        rates = as_float64(learning_rates, "learning_rates").tolist()
        if not 0 <= momentum < 1 or not weight_decay >= 0:
            raise UserError(f"momentum must lie in [0, 1) and weight_decay be ≥ 0, got {momentum} and {weight_decay}")
        steps = sorted(set(range(len(rates) + 1) if measured_at is None else measured_at))
        if not steps or not 0 <= steps[0] <= steps[-1] <= len(rates):
            raise UserError(f"measured_at must name steps between 0 and {len(rates)}, the number of learning rates")
        w, v = self._weight0.clone(), self._start_velocity(velocity, bias_velocity)
        gradient = layer_gradient(self.loss, self._h1, self._h2, len(w), self.settings)
        measured, weights = set(steps), []
        if 0 in measured:
            weights.append(w.clone())
        for step, rate in enumerate(rates):
            v.mul_(momentum).add_(gradient(w, step))
            if weight_decay:
                v.add_(w, alpha=weight_decay)
            w.sub_(v, alpha=rate)
            if step + 1 in measured:
                if not w.isfinite().all():
                    break
                weights.append(w.clone())
        eigenvalues = self._eigenvalues(weights)
        missing = len(steps) - len(eigenvalues)
        weight = w[:, :-1] if self._has_bias else w
        return LayerTrajectory(
            torch.tensor(steps),
            pad(eigenvalues, (0, 0, 0, missing), value=math.inf),
            weight if self._basis is None else weight @ self._basis.T,
            w[:, -1].clone() if self._has_bias else None,
        )

    def _joined(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return weights, or their velocity, as those of the features that are simulated."""
        joined = as_float64(weight.detach()).to(self._features[0].device)
        joined = joined if self._basis is None else joined @ self._basis
        return joined if bias is None else torch.cat([joined, as_float64(bias.detach()).to(joined)[:, None]], 1)

    def _start_velocity(self, velocity: Tensor | None, bias_velocity: Tensor | None) -> Tensor:
        d, m = len(self._weight0), self._features[0].shape[-1]
        velocity = self._weight0.new_zeros(d, m) if velocity is None else velocity
        if bias_velocity is None and self._has_bias:
            bias_velocity = velocity.new_zeros(d)
        if velocity.shape != (d, m) or (bias_velocity is None) == self._has_bias:
            raise UserError(
                f"velocity must be {(d, m)}, with a bias_velocity if the layer has a bias, got {tuple(velocity.shape)}"
            )
        return self._joined(velocity, bias_velocity)

    def _eigenvalues(self, weights: list[Tensor]) -> Tensor:
        d = len(self._weight0)
        if not weights:
            return self._weight0.new_zeros(0, d)
        h1, h2 = self._h1.flatten(0, 1), self._h2.flatten(0, 1)
        if self.loss == "simclr":
            h = torch.cat([h1, h2])
            matrices = torch.stack([_covariance(normalize(h @ w.T, dim=1)) for w in weights])
        else:
            moments = FeatureMoments.of(h1, h2)
            centered = self.settings.get("center") or self.settings.get("normalize")
            features = moments.pooled if self.loss == "vicreg" else moments.gamma(bool(centered))
            stacked = torch.stack(weights)
            matrices = stacked @ features @ stacked.mT
        finite = matrices.isfinite().all((1, 2))
        eigenvalues = torch.linalg.eigvalsh(torch.where(finite[:, None, None], matrices, 0.0)).flip(1)
        return torch.where(finite[:, None], eigenvalues, math.inf)


def leading_components(h1: Tensor, h2: Tensor, count: int) -> Tensor:
    """Return orthonormal leading eigenvectors of both views' uncentred second moment, (m, count)."""
    h = torch.cat([h1.flatten(0, -2), h2.flatten(0, -2)])
    if len(h) < h.shape[1]:
        return torch.linalg.svd(h, full_matrices=False).Vh[:count].T.contiguous()
    return torch.linalg.eigh(h.T @ h).eigenvectors.flip(1)[:, :count].contiguous()


def _variance(h1: Tensor, h2: Tensor) -> float:
    h = torch.cat([h1.flatten(0, -2), h2.flatten(0, -2)])
    return float(h.var(0, correction=0).sum())


def _covariance(z: Tensor) -> Tensor:
    z = z - z.mean(0)
    return z.T @ z / len(z)
