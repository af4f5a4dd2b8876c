"""Settings and features of the SGD training of a last linear layer, for forecasts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from stepwise_lightning.encoders import LinearEncoder, last_linear
from stepwise_lightning.errors import UserError
from stepwise_lightning.features import Views, capture, on_device, views_in
from stepwise_lightning.losses import LOSSES
from stepwise_lightning.modules.joint_embedding import JointEmbedding, rate_factor
from stepwise_lightning.precision import as_float64
from stepwise_lightning.theory.loss_derivatives import PairLoss, in_float64
from stepwise_lightning.theory.loss_signature import checked_settings, loss_properties


@dataclass(frozen=True)
class SGDSettings:
    """Loss and SGD settings of a training run."""

    loss: str | PairLoss  #: name in ``stepwise_lightning.losses.LOSSES``, or a function of both views' embeddings
    settings: dict[str, Any]  #: all settings of a loss given by its name
    rates: Tensor  #: learning rate of each remaining step, (T,)
    momentum: float
    weight_decay: float
    driven_matrix: str | None = None  #: None for the matrix of the named loss, or the covariance

    @property
    def matrix(self) -> str:
        """Matrix whose eigenvalues the loss drives."""
        return self.driven_matrix or loss_properties(self.loss).driven_matrix

    @classmethod
    def of(
        cls,
        module: nn.Module,
        start: int,
        max_steps: int,
        loss: str | PairLoss | None = None,
        settings: Mapping[str, Any] | None = None,
        learning_rate: float | Sequence[float] | Tensor | None = None,
        momentum: float | None = None,
        weight_decay: float | None = None,
    ) -> SGDSettings:
        """Return the settings of ``module`` from step ``start`` to ``max_steps``; arguments override its settings."""
        if not 0 <= start < max_steps:
            raise UserError(f"a forecast needs start < max_steps, got start={start} and max_steps={max_steps}")
        hparams: Mapping[str, Any] = {}
        if isinstance(module, JointEmbedding):
            hparams = module.hparams
            if not module.trains_with_sgd:
                raise UserError(
                    f"forecasts assume SGD on the gradient of the loss, which this {type(module).__name__} does not "
                    "use: forecast a module without another optimizer or acceleration"
                )
        loss = loss_of(module) if loss is None else loss
        loss = in_float64(loss)
        if settings is None:
            settings = {name: hparams[name] for name in checked_settings(loss, {}) if name in hparams}
        if learning_rate is None:
            hparams = hparams or _configured(module)
            learning_rate = _rates_of_module(module, hparams, start, max_steps)
        rates = _rate_of_each_step(learning_rate, max_steps - start)
        momentum = hparams.get("momentum", 0.0) if momentum is None else momentum
        weight_decay = hparams.get("weight_decay", 0.0) if weight_decay is None else weight_decay
        matrix = None if isinstance(loss, str) else getattr(module, "driven_matrix", None)
        return cls(loss, checked_settings(loss, dict(settings)), rates, momentum, weight_decay, matrix)


def _rate_of_each_step(learning_rate: float | Sequence[float] | Tensor, num_steps: int) -> Tensor:
    if isinstance(learning_rate, (int, float)):
        learning_rate = [learning_rate] * num_steps
    rates = as_float64(learning_rate, "learning_rate").cpu()
    if rates.shape != (num_steps,):
        raise UserError(
            f"learning_rate must be a number, or one for each of the {num_steps} steps to come, got "
            f"{tuple(rates.shape)}"
        )
    return rates


def _rates_of_module(module: nn.Module, hparams: Mapping[str, Any], start: int, max_steps: int) -> list[float]:
    """Return the learning rate of each step with the warm-up and cosine of a module."""
    if "learning_rate" not in hparams:
        raise UserError(
            f"learning_rate must be given: configure_optimizers of {type(module).__name__} does not return one "
            "torch.optim.SGD without a schedule"
        )
    warmup, end = hparams.get("warmup_steps", 0), max_steps if hparams.get("cosine") else math.inf
    return [hparams["learning_rate"] * rate_factor(step, warmup, end) for step in range(start, max_steps)]


def _configured(module: nn.Module) -> dict[str, Any]:
    """Return rate, momentum and weight decay of plain SGD in ``configure_optimizers``, or nothing."""
    if not isinstance(module, LightningModule):
        return {}
    try:
        optimizer = module.configure_optimizers()
    except RuntimeError:  # it reads the Trainer, which is not attached
        return {}
    options = optimizer.defaults if isinstance(optimizer, torch.optim.SGD) and len(optimizer.param_groups) == 1 else {}
    if options.get("dampening") or options.get("nesterov") or options.get("maximize"):
        return {}
    names = {"learning_rate": "lr", "momentum": "momentum", "weight_decay": "weight_decay"}
    return {name: options[option] for name, option in names.items() if option in options}


def loss_of(module: nn.Module) -> str | PairLoss:
    """Return the loss of a module of this package, its name if it has one; raise UserError for another module."""
    if isinstance(module, JointEmbedding):
        return module.loss_name or module.loss
    raise UserError(
        f"{type(module).__name__} is not a module of this package: give loss={', '.join(map(repr, LOSSES))}, with its "
        "settings, or a function of both views' embeddings, and a learning_rate"
    )


def last_layer(module: nn.Module) -> nn.Linear | LinearEncoder:
    """Return the linear layer registered last in a module; in the encoder for modules of this package."""
    layer = last_linear(module.encoder if isinstance(module, JointEmbedding) else module)
    if layer is None:
        raise UserError(f"{type(module).__name__} has no linear layer: forecasts simulate a last linear layer")
    return layer


def velocity_of(layer: nn.Linear | LinearEncoder, optimizer: torch.optim.Optimizer) -> list[Tensor] | None:
    """Return the momentum buffers of SGD for the weights and bias of a layer, or None."""
    parameters = [layer.weight] + ([] if layer.bias is None else [layer.bias])
    buffers = [optimizer.state.get(parameter, {}).get("momentum_buffer") for parameter in parameters]
    return None if any(buffer is None for buffer in buffers) else buffers


def last_features(
    module: nn.Module, layer: nn.Module, batches: Iterable[Any], num_pairs: int, views: Views | None = None
) -> tuple[Tensor, Tensor]:
    """Return the inputs of the last layer for both views, (batches, n, m) each, for at least ``num_pairs`` pairs.

    Each view of a batch is a separate forward pass with batch statistics in batch normalisation, as in training, and
    without dropout. The state of the module does not change (:func:`stepwise_lightning.features.capture`).
    """

    def features(module: nn.Module, view: Tensor) -> Tensor:
        return _inputs_of(layer, module, view)

    inputs: list[list[Tensor]] = []
    for batch in batches:
        pair = on_device(views_in(batch, views), module)
        if len(pair) != 2:
            raise UserError("a forecast needs batches of two views, got one view: set views=")
        if inputs and len(pair[0]) != len(inputs[0][0]):
            break  # the last, smaller batch of an epoch
        inputs.append(capture(module, pair, [features])["features"])
        if sum(len(h1) for h1, _ in inputs) >= num_pairs:
            break
    if not inputs:
        raise UserError("a forecast needs at least one batch of two views, got none")
    h1, h2 = (torch.stack(features_of_view).cpu() for features_of_view in zip(*inputs, strict=True))
    return h1, h2


def batched_features(
    trained: Sequence[Tensor], measured: Sequence[Tensor], size: int | None, of_rank: bool
) -> tuple[Tensor, Tensor]:
    """Return recorded inputs of the last layer for both views, (batches, n, m) each.

    ``trained`` are inputs for the first and second views of training batches by turns. With less than two batches,
    ``measured``, inputs for both views of other pairs, are used in batches of ``size``. Training batches of one rank
    are joined to global batches of ``size`` pairs, unless ``of_rank`` is True.
    """
    if len(trained) >= 4 and len(trained) % 2 == 0 and len({view.shape for view in trained}) == 1:
        stacked = torch.stack(list(trained)).flatten(2).cpu()
        h1, h2 = stacked[::2], stacked[1::2]
        count = 1 if of_rank or size is None else min(max(size // h1.shape[1], 1), len(h1))
        h1, h2 = (h[: len(h) // count * count].unflatten(0, (-1, count)).flatten(1, 2) for h in (h1, h2))
        return h1, h2
    h1, h2 = (h.flatten(1).cpu() for h in measured[:2])
    size = min(size or len(h1), len(h1))
    h1, h2 = (h[: len(h) // size * size].unflatten(0, (-1, size)) for h in (h1, h2))
    return h1, h2


def _inputs_of(layer: nn.Module, module: nn.Module, view: Tensor) -> Tensor:
    """Return the inputs (n, m) of a layer; raise a UserError if it is not the last of the module."""
    calls: list[tuple[Tensor, Tensor]] = []
    hook = layer.register_forward_hook(lambda _, args, output: calls.append((args[0], output)))
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
