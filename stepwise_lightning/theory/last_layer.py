r"""Simulation of SGD on a last linear layer with fixed features.

Legend
    n           pairs of a batch, with features h, h' in R^m
    W (d, m)    weights, b (d,) bias, z = W h + b the embedding
    C (d, d)    cross-correlation of the embeddings; λ_k the k-th eigenvalue of C or of a covariance
    η, β, ω     learning rate, momentum, weight decay; v the velocity (torch's momentum buffer)

A bias is simulated as the weight of an additional constant feature 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from stepwise_lightning.errors import UserError
from stepwise_lightning.precision import TensorLike, as_float64, as_tensor, single_threaded
from stepwise_lightning.spectrum.matrices import TABLE
from stepwise_lightning.theory.growth import check_momentum, growth_matrix
from stepwise_lightning.theory.layer_gradients import layer_gradient
from stepwise_lightning.theory.linear_flow import isotropic_growth_matrix, start_signature
from stepwise_lightning.theory.loss_derivatives import PairLoss, in_float64
from stepwise_lightning.theory.loss_signature import checked_settings, loss_properties
from stepwise_lightning.theory.moments import FeatureMoments, validated_features

_RATE_BATCHES = 16  # of a rate


@dataclass(frozen=True)
class LayerTrajectory:
    """Trajectory of a simulated last layer."""

    steps: Tensor  #: (K,), optimiser steps at which eigenvalues are computed
    eigenvalues: Tensor  #: (K, d), descending, float64; infinite after the weights diverge
    weight: Tensor  #: (d, m) after the last step; for projected features, its part in their span
    bias: Tensor | None  #: (d,) after the last step


class LastLayer:
    r"""A last linear layer z = W h + b with fixed features h.

    :meth:`simulate` reproduces ``torch.optim.SGD`` to round-off, with the gradients of
    :mod:`stepwise_lightning.theory.layer_gradients`. Barlow Twins and VICReg depend on moments of the features only: a
    step takes O(d m²) for any number of pairs. The spectral contrastive loss also needs the squared similarities of
    pairs, estimated from the first 1024. A step of SimCLR takes O(n² d). Functions are differentiated automatically.

    The features of a network change during training. From an untrained network, the simulation is accurate for the
    first mode, and for Barlow Twins and SimCLR approximate for later modes.

    Args:
        loss: name in ``stepwise_lightning.losses.LOSSES``, or a function of both views' embeddings, float64, (n, d)
            each, that returns a scalar.
        h1: features of the first views, (n, m), or in batches, (batches, n, m). Barlow Twins and VICReg descend the
            loss of the mean moments of the batches, the spectral contrastive loss the loss of all pairs; SimCLR and
            functions use one batch per step, cyclically.
        h2: features of the second views.
        weight: initial W, (d, m).
        bias: initial b, (d,), or None for a layer without bias.
        num_components: number of directions on which wide features are projected, at least 2d: half are leading
            eigenvectors of the growth matrix, half leading principal components (not centred); None for no projection.
            Exact if the rank of the features is not larger. For SimCLR only the first step is accurate. To check a
            case, double the number.
        in_turn: use one batch per step, cyclically, for all losses.
        driven_matrix: matrix of ``stepwise_lightning.spectrum.MATRICES`` whose eigenvalues are computed; None for the
            matrix that a named loss drives, and for the covariance of a function.
        settings: arguments of a loss given by its name, with the loss's defaults.

    Raises:
        ValueError: an unknown loss or setting, shapes that do not match, values that are not finite, or a number of
            components that is not between 1 and m.

    """

    def __init__(
        self,
        loss: str | PairLoss,
        h1: TensorLike,
        h2: TensorLike,
        weight: TensorLike,
        bias: TensorLike | None = None,
        num_components: int | None = None,
        in_turn: bool = False,
        driven_matrix: str | None = None,
        **settings: Any,
    ) -> None:
        self.loss, self.settings, properties = loss, checked_settings(loss, settings), loss_properties(loss)
        loss = in_float64(loss)
        self.driven_matrix = driven_matrix or properties.driven_matrix
        if self.driven_matrix not in TABLE:
            raise UserError(f"driven_matrix must be one of {', '.join(TABLE)}, got {driven_matrix!r}")
        self._features = h1, h2 = validated_features(h1, h2)
        m = h1.shape[-1]
        weight, bias = _validated_parameters(weight, bias, m)
        if num_components is not None and not 1 <= num_components <= m:
            raise UserError(f"num_components must lie between 1 and the {m} features, got {num_components}")
        self._has_bias = bias is not None
        self._basis = None
        if num_components is not None:
            growth = _growth(loss, h1, h2, len(weight), bias, self.settings)
            h = torch.cat([h1.flatten(0, 1), h2.flatten(0, 1)])
            self._basis = _components(growth, h, num_components)
        self._weight0 = self._joined(weight, bias)
        x1, x2 = self._inputs(h1), self._inputs(h2)
        in_turn = in_turn or not properties.uses_moments
        batches = zip(x1.split(1), x2.split(1), strict=True) if in_turn else [(x1, x2)]
        self._gradients = [layer_gradient(loss, a, b, len(weight), self.settings) for a, b in batches]

    def __repr__(self) -> str:
        batches, n, m = self._features[0].shape
        shapes = f"features=({batches}, {n}, {m}), weight=({len(self._weight0)}, {m}), bias={self._has_bias}"
        return f"LastLayer({loss_properties(self.loss).name!r}, {shapes})"

    @torch.no_grad()
    @single_threaded()
    def simulate(
        self,
        learning_rates: TensorLike,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        velocity: Sequence[TensorLike] | None = None,
        measured_at: Iterable[int] | None = None,
    ) -> LayerTrajectory:
        r"""Simulate the steps v ← βv + ∇L + ωW, W ← W − ηv of ``torch.optim.SGD`` for weights and bias.

        The eigenvalues over all pairs are of the driven matrix: C for Barlow Twins (centred if the loss is centred or
        normalised) and the spectral contrastive loss, the covariance for VICReg, the tangent covariance for SimCLR
        (:func:`stepwise_lightning.spectrum.measures.tangent_coordinates`).

        Args:
            learning_rates: η of each step, (T,): ``[0.002] * 600``, or any schedule.
            momentum: β in [0, 1).
            weight_decay: ω ≥ 0.
            velocity: initial v, the ``momentum_buffer`` of the weights, (d, m), and of the bias, if any, (d,); None for
                zero.
            measured_at: steps between 0 and T after which eigenvalues are computed; None for all. For normalised
                embeddings, each measurement passes all pairs through the layer.

        Raises:
            ValueError: an argument out of range or of the wrong shape.

        """
        rates, steps = _validated_schedule(learning_rates, momentum, weight_decay, measured_at)
        w, v = self._weight0.clone(), self._initial_velocity(velocity)
        measured, weights = set(steps), [self._weight0] if steps[0] == 0 else []
        for step, rate in enumerate(rates):
            v.mul_(momentum).add_(self._gradients[step % len(self._gradients)](w))
            if weight_decay:
                v.add_(w, alpha=weight_decay)
            w.sub_(v, alpha=rate)
            if step + 1 in measured:
                if not w.isfinite().all():
                    break
                weights.append(w.clone())
        eigenvalues = self._eigenvalues(weights, *(self._inputs(h.flatten(0, 1)) for h in self._features))
        eigenvalues = pad(eigenvalues, (0, 0, 0, len(steps) - len(weights)), value=math.inf)
        weight = w[:, :-1] if self._has_bias else w
        weight = weight if self._basis is None else weight @ self._basis.T
        steps_tensor = torch.tensor(steps, device=w.device)
        return LayerTrajectory(steps_tensor, eigenvalues, weight, w[:, -1] if self._has_bias else None)

    @torch.no_grad()
    @single_threaded()
    def rate_along(self, features: Tensor, weight: Tensor, bias: Tensor | None) -> float:
        """Return the rate d ln ‖W v‖/dt of gradient flow at given weights, for features v (m,).

        With a last entry of v for the constant feature of the bias, (m + 1,), W includes the bias.
        """
        w = self._joined(weight, bias)
        v = features.to(w)
        v, constant = v.split([weight.shape[1], len(v) - weight.shape[1]])
        v = v if self._basis is None else v @ self._basis
        v = pad(torch.cat([v, constant]), (0, w.shape[1] - len(v) - len(constant)))
        descent = -torch.stack([gradient(w) for gradient in self._gradients[:_RATE_BATCHES]]).mean(0) @ v
        part = w @ v
        return float(part @ descent / part.square().sum())

    def _inputs(self, h: Tensor) -> Tensor:
        """Return features (…, m), projected, and extended by a constant feature 1 for the bias."""
        h = h if self._basis is None else h @ self._basis
        return pad(h, (0, 1), value=1.0) if self._has_bias else h

    def _joined(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return weights and bias, or their velocities, as one matrix that acts on :meth:`_inputs`."""
        device = self._features[0].device
        joined = as_float64(weight.detach()).to(device)
        joined = joined if self._basis is None else joined @ self._basis
        # Copy, because the caller's optimiser may update its tensors in place.
        return joined.clone() if bias is None else torch.cat([joined, as_float64(bias.detach()).to(device)[:, None]], 1)

    def _initial_velocity(self, velocity: Sequence[TensorLike] | None) -> Tensor:
        if velocity is None:
            return torch.zeros_like(self._weight0)
        parts = [as_tensor(v, "velocity") for v in velocity]
        d = len(self._weight0)
        expected = [(d, self._features[0].shape[-1]), (d,)][: 1 + self._has_bias]
        if (shapes := [tuple(v.shape) for v in parts]) != expected:
            raise UserError(f"velocity must hold one tensor per parameter, of shapes {expected}, got {shapes}")
        return self._joined(parts[0], parts[1] if self._has_bias else None)

    def _eigenvalues(self, weights: list[Tensor], h1: Tensor, h2: Tensor) -> Tensor:
        """Return the eigenvalues for each of K weights on features (n, m), (K, d)."""
        if not weights:
            return self._weight0.new_zeros(0, len(self._weight0))
        w = torch.stack(weights)
        if self.driven_matrix in ("cross_correlation", "covariance"):
            moments = FeatureMoments.of(h1, h2)
            centred = bool(self.settings.get("center") or self.settings.get("normalize"))
            features = moments.pooled if self.driven_matrix == "covariance" else moments.gamma(centred)
            matrices = w @ features @ w.mT
        else:
            transform = TABLE[self.driven_matrix].transform
            z = (transform(torch.cat([h1, h2]) @ each.T, None) for each in w)
            matrices = torch.stack([each.T @ each / len(each) for each in (each - each.mean(0) for each in z)])
        finite = matrices.isfinite().all(2).all(1)  # squares of finite weights may overflow
        eigenvalues = torch.linalg.eigvalsh(torch.where(finite[:, None, None], matrices, 0.0)).flip(1)
        return torch.where(finite[:, None], eigenvalues, math.inf)


def _validated_parameters(weight: TensorLike, bias: TensorLike | None, m: int) -> tuple[Tensor, Tensor | None]:
    weight, bias = as_tensor(weight, "weight"), None if bias is None else as_tensor(bias, "bias")
    if weight.ndim != 2 or weight.shape[1] != m or (bias is not None and bias.shape != weight.shape[:1]):
        raise UserError(
            f"weight must be (d, m) with m = {m} features, and bias (d,) or None, got {tuple(weight.shape)}"
            + (f" and {tuple(bias.shape)}" if bias is not None else "")
        )
    if not all(values.isfinite().all() for values in (weight, bias) if values is not None):
        raise UserError("weight and bias must be finite, got NaN or infinite values: check the checkpoint")
    return weight, bias


def _validated_schedule(
    learning_rates: TensorLike, momentum: float, weight_decay: float, measured_at: Iterable[int] | None
) -> tuple[list[float], list[int]]:
    """Return the learning rates, and the measured steps in ascending order."""
    rates = as_float64(learning_rates, "learning_rates")
    check_momentum(momentum)
    if rates.ndim != 1 or not (rates >= 0).all() or not weight_decay >= 0:
        raise UserError(
            "learning_rates must be ≥ 0, one for each step (T,), and weight_decay ≥ 0, "
            f"got rates of shape {tuple(rates.shape)} and weight_decay {weight_decay}"
        )
    steps = sorted(set(range(len(rates) + 1) if measured_at is None else measured_at))
    if not steps or not 0 <= steps[0] <= steps[-1] <= len(rates):
        bounds = f"{steps[0]} to {steps[-1]}" if steps else "no steps"
        raise UserError(
            f"measured_at must be steps between 0 and {len(rates)}, the number of learning rates, got {bounds}"
        )
    return rates.tolist(), steps


def _growth(
    loss: str | PairLoss, h1: Tensor, h2: Tensor, dim: int, bias: Tensor | None, settings: dict[str, Any]
) -> Tensor:
    """Return the growth matrix (m, m) that selects directions, zero for a function without growth rates."""
    if isinstance(loss, str):
        return growth_matrix(loss, h1, h2, dim, **settings)
    try:
        growth = isotropic_growth_matrix(start_signature(loss, dim, h1.shape[1], bias)[0], h1, h2)
    except UserError:
        return h1.new_zeros(h1.shape[-1], h1.shape[-1])
    return (growth + growth.T) / 2


def _components(growth: Tensor, h: Tensor, count: int) -> Tensor:
    """Return an orthonormal basis (m, count) of leading directions, see :class:`LastLayer`."""
    moments, principal = torch.linalg.eigh(h.T @ h)
    if int((moments > 1e-12 * moments[-1]).sum()) <= count:
        return principal.flip(1)[:, :count].contiguous()
    rates, fast = torch.linalg.eigh(growth)
    num_fast = min(count // 2, int((rates > 0).sum()))
    parts = [fast.flip(1)[:, :num_fast], principal.flip(1)[:, : count - num_fast]]
    return torch.linalg.qr(torch.cat(parts, 1)).Q
