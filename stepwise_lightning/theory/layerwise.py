r"""The share of linear layers in a tangent kernel, from their inputs and the gradients of their outputs.

A linear layer on vectors has J_o = δ_o aᵀ, with a its input and δ_o the gradient of f_o with respect to its output.
That is all of the gradient only where the layer runs once and nobody else uses its weights, which is looked at, not
assumed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stepwise_lightning.theory.networks import Network

# The input of a layer, (k, in), and all outputs' gradients with respect to its output, (k, d·out).
Part = tuple[Tensor, Tensor]


class NotLayerwiseError(Exception):
    """A batch on which the layers do not run as they did on the samples that were looked at; caught within theory."""


class LinearLayers:
    """The linear layers with chosen parameters that run once, on one vector a sample, and share no weights.

    They are found out on a few samples, once with the layers' outputs cut off from their weights: what then still has
    a gradient is used elsewhere, and an output that has one of another sample's row is not in the samples' order.

    Args:
        network: what they are part of.
        names: the chosen parameters.

    Attributes:
        parameters: those of the layers that may be such, to run the network with while they are looked at.

    """

    def __init__(self, network: Network, names: list[str]) -> None:
        self._module, self._candidates = network.module, _candidates(network.module, names)
        self.parameters = {
            name: network.values[name].detach().requires_grad_()
            for layer in self._candidates
            for name in (f"{layer}.weight", f"{layer}.bias")
            if name in network.values
        }
        self._together = _Watch(cut=True, tapped=True)
        self._alone: list[tuple[int, _Watch]] = []
        self._reused: set[str] = set()
        self._reordered: set[str] = set()

    def cut_off(self) -> AbstractContextManager[None]:
        """Return a context in which outputs do not depend on the layers' weights, but for other uses of these."""
        return _watched(self._module, self._candidates, self._together)

    def watched_alone(self, index: int) -> AbstractContextManager[None]:
        """Return a context in which the sample that has this index among the others is seen alone."""
        self._alone.append((index, _Watch()))
        return _watched(self._module, self._candidates, self._alone[-1][1])

    def find_other_uses(self, f: Tensor) -> Tensor:
        """Look for gradients of outputs that were cut off, (k, d), and return these."""
        taps, weights = self._together.taps, self.parameters
        given = [*taps.values(), *weights.values()]
        # by two of three rows, because a change of order leaves one of them where it is, or none
        for index in range(min(2, len(f)) if f.requires_grad and given else 0):
            gradients = torch.autograd.grad(f[index].sum(), given, retain_graph=True, allow_unused=True)
            for layer, gradient in zip(taps, gradients, strict=False):
                others = [row for row in range(len(f)) if row != index]
                if gradient is not None and len(gradient) == len(f) and gradient[others].any():
                    self._reordered.add(layer)
            for name, gradient in zip(weights, gradients[len(taps) :], strict=True):
                if gradient is not None:
                    self._reused.add(name.rpartition(".")[0])
        return f.detach()

    def usable(self, samples: int) -> list[str]:
        """Return the names of the layers that have shown to be such, with so many samples."""
        return [
            layer
            for layer in self._candidates
            if layer not in self._reused | self._reordered
            and self._together.once(layer, samples)
            and all(self._same_row(layer, index, watch) for index, watch in self._alone)
        ]  # fmt: skip

    def _same_row(self, layer: str, index: int, alone: _Watch) -> bool:
        if not alone.once(layer, 1):
            return False
        row = self._together.inputs[layer][index]
        tolerance = 1e-3 * float(row.abs().max())
        return torch.allclose(alone.inputs[layer][0], row, rtol=0, atol=tolerance, equal_nan=True)


def linear_parts(network: Network, layers: list[str], x: Tensor) -> list[Part]:
    """Return each layer's input and all outputs' gradients with respect to its output.

    Raises:
        NotLayerwiseError: a layer that does not run once, on one vector a sample.

    """
    watch = _Watch(tapped=True)

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


class _Watch:
    """What linear layers were given in one forward pass, and what stands in for their outputs.

    Args:
        cut: let an output depend on the input alone, not on the weights; it is as large as ever.
        tapped: add zeros to the output, whose gradient is that of the output.

    """

    def __init__(self, cut: bool = False, tapped: bool = False) -> None:
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
            if not self.tapped:
                return None
            if self.cut:
                output = output.detach() + (given[0] - given[0].detach()).sum(1, keepdim=True)
            # the same one when a layer runs again, as it does under checkpointing
            return output + self.taps.setdefault(layer, torch.zeros_like(output, requires_grad=True))

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
