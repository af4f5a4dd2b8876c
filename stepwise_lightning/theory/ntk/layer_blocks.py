"""The share of all layers that can be taken one by one in a tangent kernel, in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepwise_lightning.theory.ntk.functional_module import Network
from stepwise_lightning.theory.ntk.layer_kernels import Part, gradients, share
from stepwise_lightning.theory.ntk.layers import NotLayerwiseError, Sizes, Watch, kinds, watched

# Outputs, or samples, at once, so that what they share is small against what each costs.
_ENOUGH = 8


def least_numbers(layers: Sizes) -> int:
    """Return how many numbers must be held for each sample of a pair."""
    largest = max((size.held(1) for size in layers.values()), default=0)
    return -(-(3 * (largest + 1) + _of_a_pass(layers, 1)) // 2) + 1


def layerwise(
    network: Network, names: list[str], layers: Sizes, x: Tensor, y: Tensor, outputs: int, most: int, max_bytes: int
) -> Tensor:
    """Return Σ_o ⟨J_o(x), J_o(y)⟩ of what is chosen of some layers, (k, l), float64.

    As many samples as possible are held at once, and as many layers as then fit: to split layers costs as many passes
    through the network as to split samples, but what many samples share is computed once.

    Args:
        network: what they are part of.
        names: the chosen parameters.
        layers: their sizes.
        x: samples (k, …).
        y: samples (l, …), or the same object, of which half is computed then.
        outputs: d.
        most: how many samples may be given at once.
        max_bytes: memory for what is held.

    Raises:
        NotLayerwiseError: a layer that does not run once, on one row a sample.

    """
    plan = _plan(layers, outputs, min(most, max(len(x), len(y))), x is y, max_bytes // network.dtype.itemsize)
    kernel = torch.zeros(len(x), len(y), dtype=torch.float64, device=x.device)
    for group in _groups(layers, plan):
        for start in range(0, outputs, plan.outputs):
            _Shares(network, names, group, slice(start, start + plan.outputs), plan).add_to(kernel, x, y)
    return kernel


@dataclass(frozen=True)
class _Plan:
    """How many outputs, and rows of the kernel, are taken at once; in passes of how many samples.

    Of all memory a quarter is for passes, and of what is left a third for temporary results.
    """

    outputs: int
    rows: int
    batch: int
    held: int  # numbers, for each row
    temporary: int  # numbers, for each side


def _plan(layers: Sizes, outputs: int, most: int, symmetric: bool, room: int) -> _Plan:
    at_once = outputs
    while True:
        a_pass = _of_a_pass(layers, at_once)
        batch = max(1, min(most, room // (4 * a_pass)))
        left = room - batch * a_pass
        temporary = left // 6
        largest = max(size.held(at_once) for size in layers.values())
        rows = (left - 2 * temporary) // largest
        sides = 1 if symmetric and rows >= most else 2
        rows = min(rows // sides, most)
        # all outputs if all samples go in with them
        enough = rows >= (most if at_once > _ENOUGH else 1) and batch >= min(most, _ENOUGH)
        if enough or at_once == 1:
            rows = max(1, rows)
            return _Plan(at_once, rows, batch, (left - 2 * temporary) // (sides * rows), temporary)
        at_once = -(-at_once // 2)


def _of_a_pass(layers: Sizes, outputs: int) -> int:
    """Return about how many numbers a sample takes in a pass forwards, and backwards from some outputs."""
    return max(1, sum(size.given + (outputs + 1) * size.returned for size in layers.values()))


def _groups(layers: Sizes, plan: _Plan) -> list[Sizes]:
    """Return layers that are held together, in their order."""
    groups: list[Sizes] = []
    taken = plan.held
    for layer, size in layers.items():
        taken += size.held(plan.outputs)
        if taken > plan.held:
            groups.append({})
            taken = size.held(plan.outputs)
        groups[-1][layer] = size
    return groups


class _Shares:
    """The shares of a few layers and outputs.

    Args:
        network: what they are part of.
        names: the chosen parameters.
        layers: the layers.
        outputs: the outputs.
        plan: of how many samples at once.

    """

    def __init__(self, network: Network, names: list[str], layers: Sizes, outputs: slice, plan: _Plan) -> None:
        self._network, self._outputs, self._plan = network, outputs, plan
        self._layers = {layer: network.module.get_submodule(layer) for layer in layers}
        self._chosen = {layer: kinds(layer, names) for layer in layers}
        self._compact = {layer: size.compact(plan.outputs) for layer, size in layers.items()}

    def add_to(self, kernel: Tensor, x: Tensor, y: Tensor) -> None:
        """Add the shares to the kernel, (k, l)."""
        rows = self._plan.rows
        for i in range(0, len(x), rows):
            left = self._parts(x[i : i + rows])
            for j in range(i if x is y else 0, len(y), rows):
                right = left if x is y and i == j else self._parts(y[j : j + rows])
                block = self._contract(left, right)
                kernel[i : i + rows, j : j + rows] += block
                if x is y and i != j:
                    kernel[j : j + rows, i : i + rows] += block.T
                del right  # before others are made
            del left

    def _parts(self, x: Tensor) -> list[Part | Tensor]:
        """Return for each layer what its share is computed from, for samples (k, …)."""
        passes = [self._pass(samples) for samples in x.split(self._plan.batch)]
        # what is joined is let go
        return passes[0] if len(passes) == 1 else [_joined([given.pop(0) for given in passes]) for _ in self._layers]

    def _contract(self, left: list[Part | Tensor], right: list[Part | Tensor]) -> Tensor:
        """Return the sum of the shares, (k, l)."""
        shares = [
            share(part, self._chosen[layer], a, b, self._plan.temporary)
            for (layer, part), a, b in zip(self._layers.items(), left, right, strict=True)
        ]
        return torch.stack(shares).sum(0)

    def _pass(self, x: Tensor) -> list[Part | Tensor]:
        watch = Watch(tapped=True)

        def backwards(f: Tensor) -> list[Sequence[Tensor]]:
            if not all(watch.once(layer, len(x)) for layer in self._layers):
                raise NotLayerwiseError
            taps = [watch.taps[layer] for layer in self._layers]
            # Samples do not mix, so that the gradient of a sum holds each sample's own.
            some = f.sum(0)[self._outputs]
            if not f.requires_grad:
                return [[torch.zeros_like(tap) for tap in taps]] * len(some)
            return [torch.autograd.grad(out, taps, retain_graph=True, materialize_grads=True) for out in some]

        with torch.enable_grad(), watched(self._network.module, self._layers, watch):
            deltas = self._network(x, then=backwards)
        return [
            self._reduced(layer, (watch.features[layer], list(of_layer)))
            for layer, of_layer in zip(self._layers, zip(*deltas, strict=True), strict=True)
        ]

    def _reduced(self, layer: str, part: Part) -> Part | Tensor:
        if not self._compact[layer]:
            return part
        return gradients(self._layers[layer], self._chosen[layer], part, self._plan.temporary)


def _joined(parts: Sequence[Part | Tensor]) -> Part | Tensor:
    """Return the parts of some samples after each other as one."""
    if isinstance(parts[0], Tensor):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    given, deltas = zip(*parts, strict=True)
    return torch.cat(given), [torch.cat(of_output) for of_output in zip(*deltas, strict=True)]
