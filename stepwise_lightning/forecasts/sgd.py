"""How the last linear layer of a network is trained: what a forecast has to know, read from a module or given."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stepwise_lightning.encoders import LinearEncoder, bias_of, last_linear
from stepwise_lightning.errors import UserError
from stepwise_lightning.features import Views, capture, on_device, views_in
from stepwise_lightning.losses import LOSSES, loss_settings
from stepwise_lightning.modules import JointEmbedding, rate_factor

__all__ = ["SGDSettings", "last_features", "last_layer", "loss_of", "velocity_of"]


@dataclass(frozen=True)
class SGDSettings:
    """A loss and the SGD that descends it."""

    loss: str
    settings: dict[str, Any]
    """All of the loss's own."""
    rates: Tensor
    """(T,), the learning rate of each step to come."""
    momentum: float
    weight_decay: float

    @classmethod
    def of(
        cls,
        module: nn.Module,
        start: int,
        max_steps: int,
        loss: str | None = None,
        settings: Mapping[str, Any] | None = None,
        learning_rate: float | Sequence[float] | Tensor | None = None,
        momentum: float | None = None,
        weight_decay: float | None = None,
    ) -> SGDSettings:
        """Return how ``module`` is trained from step ``start`` to ``max_steps``; what is given goes before its own."""
        if not 0 <= start < max_steps:
            raise UserError(f"there must be steps to come: got start={start} and max_steps={max_steps}")
        own: Mapping[str, Any] = module.hparams if isinstance(module, JointEmbedding) else {}
        if isinstance(module, JointEmbedding) and not module.trains_with_sgd:
            raise UserError(
                f"forecasts assume SGD on the gradient of the loss, which this {type(module).__name__} does not use: "
                "forecast a module without another optimizer or acceleration"
            )
        loss = loss or loss_of(module)
        if settings is None:
            known = loss_settings(loss, {})
            settings = {name: own[name] for name in known if name in own}
        rate = own.get("learning_rate") if learning_rate is None else learning_rate
        if rate is None:
            raise UserError(f"learning_rate must be given: {type(module).__name__} is none of this package's modules")
        if isinstance(rate, (int, float)):
            warmup, end = own.get("warmup_steps", 0), max_steps if own.get("cosine") else math.inf
            scheduled = learning_rate is None
            factors = [rate_factor(k, warmup, end) if scheduled else 1.0 for k in range(start, max_steps)]
            rate = [rate * factor for factor in factors]
        rates = torch.as_tensor(rate, dtype=torch.float64)
        if rates.shape != (max_steps - start,):
            raise UserError(
                f"learning_rate must be a number, or one for each of the {max_steps - start} steps to come, got "
                f"{tuple(rates.shape)}"
            )
        return cls(
            loss,
            loss_settings(loss, dict(settings)),
            rates,
            own.get("momentum", 0.0) if momentum is None else momentum,
            own.get("weight_decay", 0.0) if weight_decay is None else weight_decay,
        )


def loss_of(module: nn.Module) -> str:
    """Return the name of the loss of one of this package's modules; raise UserError for another module."""
    if isinstance(module, JointEmbedding) and module.loss_name is not None:
        return module.loss_name
    raise UserError(
        f"{type(module).__name__} is not a module of this package: give loss={', '.join(map(repr, LOSSES))}, with its "
        "settings and a learning_rate"
    )


def last_layer(module: nn.Module) -> nn.Linear | LinearEncoder:
    """Return the last linear layer of a module: that which was registered last, of ours in its encoder."""
    layer = last_linear(module.encoder if isinstance(module, JointEmbedding) else module)
    if layer is None:
        raise UserError(f"{type(module).__name__} has no linear layer: a forecast is one of a last linear layer")
    return layer


def velocity_of(layer: nn.Linear | LinearEncoder, optimizer: torch.optim.Optimizer) -> list[Tensor] | None:
    """Return what SGD has in its momentum buffers of a layer's weights and bias; None if it has none."""
    parameters = [layer.weight] + ([] if (bias := bias_of(layer)) is None else [bias])
    buffers = [optimizer.state.get(parameter, {}).get("momentum_buffer") for parameter in parameters]
    return None if any(buffer is None for buffer in buffers) else buffers


def last_features(
    module: nn.Module,
    layer: nn.Module,
    batches: Iterable[Any],
    num_pairs: int,
    views: Views | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what enters the last layer, (batches, n, m) of either view, from as many batches as hold ``num_pairs``.

    Each view of a batch passes on its own, with its statistics in batch normalisation, as in training; chance (dropout)
    is off. Of the module nothing is changed (:func:`stepwise_lightning.features.capture`).

    Raises:
        ValueError: no batches, of one size, of two views; or the layer is not the module's last.

    """

    def features(module: nn.Module, view: Tensor) -> Tensor:
        calls: list[tuple[Tensor, Tensor]] = []
        hook = layer.register_forward_hook(lambda _, given, output: calls.append((given[0], output)))
        try:
            embeddings = module(view)
        finally:
            hook.remove()
        if len(calls) != 1 or not isinstance(embeddings, Tensor) or not torch.equal(calls[0][1], embeddings):
            raise UserError(
                f"{type(module).__name__} does not end in its last linear layer, which ran {len(calls)} times: give a "
                "module from a view to embeddings that does (such as nn.Sequential(backbone, projector)), and layer="
            )
        return calls[0][0].flatten(1)

    first: list[Tensor] = []
    second: list[Tensor] = []
    for batch in batches:
        pair = on_device(views_in(batch, views), module)
        if len(pair) != 2:
            raise UserError("a forecast needs batches of two views each, got one: see views=")
        if first and len(pair[0]) != len(first[0]):
            break  # the rest of an epoch
        h1, h2 = capture(module, pair, [features])["features"]
        first.append(h1)
        second.append(h2)
        if sum(map(len, first)) >= num_pairs:
            break
    if not first:
        raise UserError("a forecast needs at least one batch of two views, got none")
    return torch.stack(first).cpu(), torch.stack(second).cpu()
