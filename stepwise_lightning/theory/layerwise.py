r"""The share of linear layers in a tangent kernel, from their inputs and the gradients of their outputs.

A linear layer on vectors has J_o = δ_o aᵀ, with a its input and δ_o the gradient of f_o with respect to its output.
That is all of the gradient only where the layer runs once and nobody else uses its weights, which is looked at, not
assumed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stepwise_lightning.theory.networks import Network

# The input of a layer, (k, in), and all outputs' gradients with respect to its output, (k, d·out).
Part = tuple[Tensor, Tensor]


class NotLayerwiseError(Exception):
    """A batch on which the layers do not run as they did on the samples that were looked at; caught within theory."""


def linear_layers(network: Network, names: list[str], samples: Tensor) -> list[str]:
    """Return the linear layers with chosen parameters that run once, on one vector a sample, and share no weights.

    On a few samples the layers' outputs are cut off from their weights: what still has a gradient is used elsewhere.

    Args:
        network: what they are part of.
        names: the chosen parameters.
        samples: a few, (k, …).

    """
    candidates = _candidates(network.module, names)
    weights = {f"{layer}.{kind}": part for layer in candidates for kind, part in _own(network, layer)}
    alone, together = _Watch(candidates), _Watch(candidates, cut=True)
    if not candidates:
        return []
    with torch.no_grad(), _watched(network.module, candidates, alone):
        network(samples[:1])
    with torch.enable_grad(), _watched(network.module, candidates, together):
        f = network(samples, weights).sum()
    used: list[Tensor | None] = [None] * len(weights)
    if f.requires_grad:
        used = list(torch.autograd.grad(f, list(weights.values()), allow_unused=True))
    elsewhere = {name.rpartition(".")[0] for name, gradient in zip(weights, used, strict=True) if gradient is not None}
    return [
        layer
        for layer in candidates
        if layer not in elsewhere and alone.once(layer, 1) and together.once(layer, len(samples))
        and torch.allclose(alone.inputs[layer], together.inputs[layer][:1], rtol=1e-3, equal_nan=True)
    ]  # fmt: skip


def linear_parts(network: Network, layers: list[str], x: Tensor) -> list[Part]:
    """Return each layer's input and all outputs' gradients with respect to its output.

    Raises:
        NotLayerwiseError: a layer that does not run once, on one vector a sample.

    """
    watch = _Watch(layers, tapped=True)

    def backwards(f: Tensor) -> list[Sequence[Tensor]]:
        if not all(watch.once(layer, len(x)) for layer in layers):
            raise NotLayerwiseError
        taps = [watch.taps[layer] for layer in layers]
        if not f.requires_grad:
            return [[torch.zeros_like(tap) for tap in taps]] * f.shape[1]
        # Samples do not mix, so that the gradient of a sum holds each sample's own.
        return [torch.autograd.grad(out, taps, retain_graph=True, materialize_grads=True) for out in f.sum(0)]

    with torch.enable_grad(), _watched(network.module, layers, watch):
        deltas = network(x, then=backwards)
    return [(watch.inputs[layer], torch.cat([d[i] for d in deltas], 1)) for i, layer in enumerate(layers)]


def contract(names: list[str], layers: list[str], a: list[Part], b: list[Part]) -> Tensor:
    """Return Σ over layers of (Σ_o δ_o(x)·δ_o(y)) (a(x)·a(y) + 1), each of the two for what is chosen, (k, l)."""
    total: Tensor | int = 0
    for layer, (inputs_a, deltas_a), (inputs_b, deltas_b) in zip(layers, a, b, strict=True):
        product = (inputs_a @ inputs_b.T).double() if f"{layer}.weight" in names else 0.0
        product = product + (1.0 if f"{layer}.bias" in names else 0.0)
        total = total + (deltas_a @ deltas_b.T).double() * product
    assert isinstance(total, Tensor)
    return total


def _candidates(module: nn.Module, names: list[str]) -> list[str]:
    owners = Counter(id(p) for part in module.modules() for p in part.parameters(recurse=False))
    return [
        name
        for name, part in module.named_modules()
        if type(part) is nn.Linear
        and any(f"{name}.{kind}" in names for kind in ("weight", "bias"))
        and all(owners[id(p)] == 1 for p in part.parameters(recurse=False))
        # no weights computed on the way, and nothing between the layer and its output
        and set(dict(part.named_parameters(recurse=False))) <= {"weight", "bias"}
        and "weight" in dict(part.named_parameters(recurse=False))
        and not part._forward_hooks and not part._forward_pre_hooks and "forward" not in vars(part)
    ]  # fmt: skip


def _own(network: Network, layer: str) -> list[tuple[str, Tensor]]:
    kinds = [kind for kind in ("weight", "bias") if f"{layer}.{kind}" in network.values]
    return [(kind, network.values[f"{layer}.{kind}"].detach().requires_grad_()) for kind in kinds]


class _Watch:
    """What linear layers were given in one forward pass, and what stands in for their outputs.

    Args:
        layers: their names.
        cut: let an output depend on the input alone, not on the weights.
        tapped: add zeros to the output, whose gradient is that of the output.

    """

    def __init__(self, layers: list[str], cut: bool = False, tapped: bool = False) -> None:
        self.calls: Counter[str] = Counter()
        self.inputs: dict[str, Tensor] = {}
        self.taps: dict[str, Tensor] = {}
        self.cut, self.tapped = cut, tapped

    def hook(self, layer: str) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        """Return the forward hook of one layer."""

        def note(_part: nn.Module, given: Any, output: Tensor) -> Tensor | None:
            self.calls[layer] += 1
            if not given or given[0].ndim != 2:
                self.calls[layer] += 1
                return None
            self.inputs.setdefault(layer, given[0].detach())
            if self.cut:
                return output.detach() + 0 * given[0].sum(1, keepdim=True)
            if self.tapped:
                # the same one when a layer runs again, as it does under checkpointing
                tap = self.taps.setdefault(layer, torch.zeros_like(output, requires_grad=True))
                return output + tap
            return None

        return note

    def once(self, layer: str, samples: int) -> bool:
        """Whether the layer ran once, on one vector a sample."""
        return self.calls[layer] == 1 and len(self.inputs[layer]) == samples


@contextmanager
def _watched(module: nn.Module, layers: list[str], watch: _Watch) -> Iterator[None]:
    """Watch these layers for a while."""
    hooks = [module.get_submodule(layer).register_forward_hook(watch.hook(layer)) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
