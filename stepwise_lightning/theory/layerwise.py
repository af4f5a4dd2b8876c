r"""The layers of a network whose gradients are made of their input and the gradients of their output.

That is all of the gradient only where a layer runs once, on one row a sample, and nobody else uses its weights, which
is looked at, not assumed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stepwise_lightning.theory.networks import Network
from stepwise_lightning.theory.shares import KINDS, Part, features, share


# Layers by name, each with how many numbers a sample has in its features, and in its output.
Sizes = dict[str, tuple[int, int]]

# Outputs at once, so that what they share is small against what each costs.
_ENOUGH = 8


class NotLayerwiseError(Exception):
    """A batch on which the layers do not run as they did on the samples that were looked at; caught within theory."""


class Layers:
    """The layers with chosen parameters, of `KINDS`, that run once, on one row a sample, and share no weights.

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

    def usable(self, samples: int) -> Sizes:
        """Return the layers that have shown to be such, with so many samples."""
        return {
            layer: (self._together.features[layer][0].numel(), self._together.taps[layer][0].numel())
            for layer in self._candidates
            if layer not in self._reused | self._reordered
            and self._together.once(layer, samples)
            and all(self._same_row(layer, index, watch) for index, watch in self._alone)
        }  # fmt: skip

    def _same_row(self, layer: str, index: int, alone: _Watch) -> bool:
        if not alone.once(layer, 1):
            return False
        row, same = self._together.features[layer][index], alone.features[layer][0]
        tolerance = 1e-3 * float(row.abs().max())
        return row.shape == same.shape and torch.allclose(same, row, rtol=0, atol=tolerance, equal_nan=True)


def least_numbers(layers: Sizes) -> int:
    """Return how many numbers must be held for each sample of a pair."""
    largest = max((given + returned for given, returned in layers.values()), default=0)
    return -(-(3 * largest + _of_a_pass(layers)) // 2)


def layerwise(
    network: Network, names: list[str], layers: Sizes, x: Tensor, y: Tensor, outputs: int, most: int, max_bytes: int
) -> Tensor:
    """Return Σ_o ⟨J_o(x), J_o(y)⟩ of what is chosen of some layers, (k, l), float64.

    As many samples as possible are held at once, and for that as many layers as then fit: whether samples or layers
    are split makes no difference to the number of passes, but pairs of many samples share more.

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
    room = max_bytes // network.dtype.itemsize
    batch = max(1, min(most, room // (4 * _of_a_pass(layers))))
    room -= batch * _of_a_pass(layers)
    temporary = room // 6  # of each side
    room -= 2 * temporary
    at_once, rows = _at_once(layers, outputs, most, room if x is y else room // 2)
    if rows < most or x is not y:
        at_once, rows = _at_once(layers, outputs, most, room // 2)
        room //= 2
    kernel = torch.zeros(len(x), len(y), dtype=torch.float64, device=x.device)
    for group in _groups(layers, at_once, room // rows):
        for start in range(0, outputs, at_once):

            def parts(samples: Tensor, some: slice = slice(start, start + at_once), group: list[str] = group) -> list[Part]:
                return _parts(network, group, samples, some, batch)

            for i in range(0, len(x), rows):
                left = parts(x[i : i + rows])
                for j in range(i if x is y else 0, len(y), rows):
                    right = left if x is y and i == j else parts(y[j : j + rows])
                    block = _contract(network, names, group, left, right, temporary)
                    kernel[i : i + rows, j : j + rows] += block
                    if x is y and i != j:
                        kernel[j : j + rows, i : i + rows] += block.T
    return kernel


def _of_a_pass(layers: Sizes) -> int:
    """Return about how many numbers a sample takes in a pass forwards and backwards."""
    return max(1, sum(given + 2 * returned for given, returned in layers.values()))


def _at_once(layers: Sizes, outputs: int, most: int, room: int) -> tuple[int, int]:
    """Return of how many outputs, and samples, the gradients of any layer are held, in so many numbers."""

    def rows(at_once: int) -> int:
        return room // max(given + at_once * returned for given, returned in layers.values())

    at_once = outputs
    # all outputs if all samples go in with them, else enough of them to be worth a pass forwards
    while at_once > 1 and rows(at_once) < (most if at_once > _ENOUGH else 1):
        at_once = -(-at_once // 2)
    return at_once, max(1, min(rows(at_once), most))


def _groups(layers: Sizes, outputs: int, room: int) -> list[list[str]]:
    """Return layers that go together into so many numbers a sample, in their order."""
    groups: list[list[str]] = []
    taken = room
    for layer, (given, returned) in layers.items():
        taken += given + outputs * returned
        if taken > room:
            groups.append([])
            taken = given + outputs * returned
        groups[-1].append(layer)
    return groups


def _parts(network: Network, layers: list[str], x: Tensor, outputs: slice, batch: int) -> list[Part]:
    """Return each layer's features and the gradients of some outputs with respect to its output."""
    passes = [_pass(network, layers, some, outputs) for some in x.split(batch)]
    if len(passes) == 1:
        return passes[0]
    parts = []
    for _ in layers:  # what is joined is let go
        features, deltas = zip(*(part.pop(0) for part in passes), strict=True)
        parts.append((torch.cat(features), [torch.cat(of_an_output) for of_an_output in zip(*deltas, strict=True)]))
    return parts


def _pass(network: Network, layers: list[str], x: Tensor, outputs: slice) -> list[Part]:
    watch = _Watch(tapped=True)

    def backwards(f: Tensor) -> list[Sequence[Tensor]]:
        if not all(watch.once(layer, len(x)) for layer in layers):
            raise NotLayerwiseError
        taps = [watch.taps[layer] for layer in layers]
        # Samples do not mix, so that the gradient of a sum holds each sample's own.
        some = f.sum(0)[outputs]
        if not f.requires_grad:
            return [[torch.zeros_like(tap) for tap in taps]] * len(some)
        return [torch.autograd.grad(out, taps, retain_graph=True, materialize_grads=True) for out in some]

    with torch.enable_grad(), _watched(network.module, layers, watch):
        deltas = network(x, then=backwards)
    return [(watch.features[layer], [d[i] for d in deltas]) for i, layer in enumerate(layers)]


def _contract(network: Network, names: list[str], layers: list[str], a: list[Part], b: list[Part], room: int) -> Tensor:
    total: Tensor | float = 0.0
    for layer, left, right in zip(layers, a, b, strict=True):
        weight, bias = (f"{layer}.{kind}" in names for kind in ("weight", "bias"))
        total = total + share(network.module.get_submodule(layer), weight, bias, left, right, room)
    assert isinstance(total, Tensor)
    return total


def _candidates(module: nn.Module, names: list[str]) -> list[str]:
    owners = Counter(id(p) for part in module.modules() for p in part.parameters(recurse=False))
    return [
        name
        for name, part in module.named_modules()
        if type(part) in KINDS
        and any(f"{name}.{kind}" in names for kind in ("weight", "bias"))
        and all(owners[id(p)] == 1 for p in part.parameters(recurse=False))
        # no weights computed on the way, and nothing between the layer and its output
        and set(dict(part.named_parameters(recurse=False))) <= {"weight", "bias"}
        and "weight" in dict(part.named_parameters(recurse=False))
        and not part._forward_hooks and not part._forward_pre_hooks and "forward" not in vars(part)
    ]  # fmt: skip


class _Watch:
    """What layers were given in one forward pass, and what stands in for their outputs.

    Args:
        cut: let an output depend on the input alone, not on the weights; it is as large as ever.
        tapped: add zeros to the output, whose gradient is that of the output.

    """

    def __init__(self, cut: bool = False, tapped: bool = False) -> None:
        self.calls: Counter[str] = Counter()
        self.features: dict[str, Tensor] = {}
        self.taps: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}
        self.cut, self.tapped = cut, tapped

    def hook(self, layer: str) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        """Return the forward hook of one layer."""

        def note(part: nn.Module, given: Any, output: Tensor) -> Tensor | None:
            self.calls[layer] += 1
            seen = features(part, given[0]) if given else None
            if seen is None:
                self.calls[layer] += 1
                return None
            if layer not in self.features:
                self.features[layer], self._versions[layer] = seen, seen._version
            if not self.tapped:
                return None
            if self.cut:
                dependence = (given[0] - given[0].detach()).flatten(1).sum(1)
                output = output.detach() + dependence.view(-1, *[1] * (output.ndim - 1))
            # the same one when a layer runs again, as it does under checkpointing
            if layer not in self.taps:
                self.taps[layer] = torch.zeros((), dtype=output.dtype, device=output.device).expand_as(output).requires_grad_()
            return output + self.taps[layer]

        return note

    def once(self, layer: str, samples: int) -> bool:
        """Whether the layer ran once, on one row a sample that has not been changed in place since."""
        return (
            self.calls[layer] == 1
            and len(self.features[layer]) == samples
            and self.features[layer]._version == self._versions[layer]
        )


@contextmanager
def _watched(module: nn.Module, layers: list[str], watch: _Watch) -> Iterator[None]:
    """Watch these layers for a while."""
    hooks = [module.get_submodule(layer).register_forward_hook(watch.hook(layer)) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
