"""Derivatives of a loss at equal embeddings; legend in :mod:`stepwise_lightning.theory.loss_signature`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stepwise_lightning.errors import UserError
from stepwise_lightning.losses import sum_terms
from stepwise_lightning.precision import TensorLike, as_float64
from stepwise_lightning.user_loss import named_terms

# A loss of both views' embeddings (n, d), with all its settings: a scalar, or a dictionary of terms.
PairLoss = Callable[[Tensor, Tensor], Any]

TOLERANCE = 1e-6  # relative, of all tests of a property
# Steps of central differences, relative to the norm of the bias; the second is for an eps below 1e-7 under a root.
_STEP, _SMALL_STEP = 1e-5, 1e-7
# Cosine between gradient and embeddings; an eps under the root of a norm or variance gives more.
_ORTHOGONAL = 1e-9
# Of differences at two steps, of a loss that rounds its embeddings.
_ROUNDED = 1e-3
_RANDOM = (
    "the loss is random or changes from call to call: draw its random numbers once, or from a generator seeded in each "
    "call, and remove queues and running averages"
)


class LossDerivatives:
    """F of a loss and its derivatives at equal embeddings, z (2, n, d)."""

    def __init__(self, loss: PairLoss, dim: int, num_pairs: int, bias: TensorLike | None) -> None:
        self.loss = in_float64(loss)
        self.point = equal_embeddings(num_pairs, dim, bias)
        self.bias = self.point[0, 0]
        if num_pairs < 2 or dim < 1 + bool(self.bias.any()):
            raise UserError(
                f"a signature needs at least 2 pairs and 1 dimension besides the bias, got {num_pairs}, {dim}"
            )
        self._scale = float(self.bias.norm()) or 1.0
        self._generator = torch.Generator().manual_seed(0)
        with torch.enable_grad():
            self._z = self.point.clone().requires_grad_()
            value = self._value(self._z)
            self.value = value.item()
            (self._graph,) = torch.autograd.grad(value, self._z, create_graph=True)
        self.at_point = self._graph.detach()

    def __call__(self, z: Tensor) -> Tensor:
        """Return F at embeddings z."""
        with torch.enable_grad():
            z = z.clone().requires_grad_()
            return torch.autograd.grad(self._value(z), z)[0]

    def _value(self, z: Tensor) -> Tensor:
        return loss_value(self.loss, z[0], z[1])

    def second_derivatives(self, direction: Tensor) -> Tensor:
        """Return the derivative of F along a direction (2, n, d), by automatic differentiation."""
        if not self._graph.requires_grad:
            return torch.zeros_like(direction)
        return torch.autograd.grad(self._graph, self._z, direction, retain_graph=True, materialize_grads=True)[0]

    def differences(self, direction: Tensor) -> Tensor:
        """Return the derivative of F along a direction, by central differences of fourth order."""
        near, far = self._central(direction, _STEP)
        return (4 * near - far) / 3

    def _central(self, direction: Tensor, step: float) -> tuple[Tensor, Tensor]:
        """Return the central differences for a step and twice the step."""
        steps = [step * self._scale, 2 * step * self._scale]
        near, far = ((self(self.point + s * direction) - self(self.point - s * direction)) / (2 * s) for s in steps)
        return near, far

    def check_derivatives(self) -> bool:
        """Return whether F is the gradient of the loss; raise a UserError if F is not differentiable."""
        direction = self._random()
        derivative = self.second_derivatives(direction)
        for step in (_STEP, _SMALL_STEP):
            near, far = self._central(direction, step)
            if (derivative - (4 * near - far) / 3).norm() <= TOLERANCE * max(derivative.norm(), near.norm()):
                return True
        # The differences of a smooth field converge, while at a kink or a pole they grow as the inverse step.
        if not near.norm() <= 1.01 * far.norm() + TOLERANCE * self.at_point.norm() / self._scale:
            raise UserError(
                "the loss is not differentiable at equal embeddings: give a bias if it normalises embeddings (cosine "
                "similarity), and add a positive eps under its roots"
            )
        if (far - near).norm() > _ROUNDED * near.norm() + TOLERANCE * self(self.point + self._scale * direction).norm():
            raise UserError("the loss rounds its embeddings, for example to half precision: remove casts")
        return False

    def is_permutation_invariant(self) -> bool:
        """Return whether F(Pz) = P F(z) for a permutation P of the pairs; raise a UserError for a random loss."""
        z = self.point + self._scale * self._random()
        n = z.shape[1]
        order = torch.randperm(n, generator=self._generator, device="cpu")
        order = order.flip(0) if torch.equal(order, torch.arange(n, device="cpu")) else order
        values, again, permuted = self(z), self(z), self(z[:, order])
        size = TOLERANCE * values.norm()
        if not (again - values).norm() <= size:
            raise UserError(_RANDOM)
        return bool((permuted - values[:, order]).norm() <= size)

    def block_products(self, unit: Tensor, product: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return A_ac u and (A_ac + B_ac) u for u (d,), with indices a, row, c."""
        n = self.point.shape[1]
        a, total = [], []
        for view in (0, 1):
            direction = torch.zeros_like(self.point)
            direction[view, 0] = unit
            response = product(direction)
            total.append(n * response.sum(1))
            a.append(n * (response[:, 0] - response[:, 1:].mean(1)))
        return torch.stack(a, 2), torch.stack(total, 2)

    def _random(self) -> Tensor:
        return torch.randn(self.point.shape, generator=self._generator, dtype=torch.float64, device="cpu")


def in_float64(loss: Any) -> Any:
    """Return a loss for float64 embeddings on the CPU; of modules, whose calls may change their state, a copy."""
    if isinstance(loss, nn.Module):
        return copy.deepcopy(loss).double().cpu()
    owner: Any = getattr(loss, "__self__", None)  # of a method, such as JointEmbedding.loss
    if isinstance(function := getattr(owner, "loss_function", None), nn.Module):
        owner = copy.copy(owner)
        owner._modules = owner._modules | {"loss_function": in_float64(function)}
        return getattr(owner, loss.__name__)
    return loss


def loss_value(loss: PairLoss, z1: Tensor, z2: Tensor) -> Tensor:
    """Return the loss of float64 embeddings; raise a UserError if it is not a float64 scalar with a gradient.

    The loss may change its arguments in place.
    """
    value = sum_terms(named_terms(loss(z1.clone(), z2.clone())))
    if value.dtype != torch.float64:
        raise UserError(
            f"the loss must return a float64 scalar for float64 embeddings, got {value.dtype} of shape (): remove casts"
        )
    if not value.requires_grad:
        raise UserError("the loss has no gradient: it must be computed from the embeddings by torch operations")
    return value


def is_scale_invariant(loss: PairLoss, num_pairs: int, dim: int) -> bool:
    """Return whether a loss does not depend on the common length of both views' embeddings (n, d), as of cosines.

    Its gradient is then orthogonal to the embeddings. Raises a UserError for a loss that draws random numbers.
    """
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, num_pairs, dim, generator=generator, dtype=torch.float64, device="cpu")
    gradients = []
    for _ in range(2):
        with torch.enable_grad():
            views = z.clone().requires_grad_()
            gradients.append(torch.autograd.grad(loss_value(loss, views[0], views[1]), views)[0])
    size = gradients[0].norm()
    if not (gradients[1] - gradients[0]).norm() <= TOLERANCE * size:
        raise UserError(_RANDOM)
    return bool((z * gradients[0]).sum().abs() <= _ORTHOGONAL * z.norm() * size)


def equal_embeddings(num_pairs: int, dim: int, bias: TensorLike | None) -> Tensor:
    """Return both views' embeddings, (2, n, d), all equal to the bias."""
    if num_pairs < 1 or dim < 1:
        raise UserError(f"num_pairs and dim must be at least 1, got {num_pairs} and {dim}")
    b = as_float64([0.0] * dim if bias is None else bias, "bias").detach().cpu()
    if b.shape != (dim,) or not b.isfinite().all():
        raise UserError(f"bias must be {dim} finite numbers, got shape {tuple(b.shape)}")
    return b.expand(2, num_pairs, dim).clone()
