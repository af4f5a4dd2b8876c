r"""The layers of a network whose gradients are made of their input and the gradients of their output.

That is all of the gradient only where a layer runs once, on one row a sample, and nobody else uses its weights, which
is looked at, not assumed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stepwise_lightning.theory.ntk.functional_module import Network
from stepwise_lightning.theory.ntk.layer_kernels import KINDS, SUMS, Size, features

# Layers by name, with their sizes.
Sizes = dict[str, Size]


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
        self._module, self._names = network.module, names
        self._candidates = _candidates(network.module, names)
        self.parameters = {
            name: network.values[name].detach().requires_grad_()
            for layer in self._candidates
            for name in (f"{layer}.weight", f"{layer}.bias")
            if name in network.values
        }
        self._together = Watch(cut=True, tapped=True)
        self._alone: list[tuple[int, Watch]] = []
        self._reused: set[str] = set()
        self._reordered: set[str] = set()

    def cut_off(self) -> AbstractContextManager[None]:
        """Return a context in which outputs do not depend on the layers' weights, but for other uses of these."""
        return watched(self._module, self._candidates, self._together)

    def watched_alone(self, index: int) -> AbstractContextManager[None]:
        """Return a context in which the sample that has this index among the others is seen alone."""
        self._alone.append((index, Watch()))
        return watched(self._module, self._candidates, self._alone[-1][1])

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
            layer: self._size(layer)
            for layer in self._candidates
            if layer not in self._reused | self._reordered
            and self._together.once(layer, samples)
            and all(self._same_row(layer, index, watch) for index, watch in self._alone)
        }  # fmt: skip

    def _size(self, layer: str) -> Size:
        chosen = [self.parameters[f"{layer}.{kind}"] for kind in kinds(layer, self._names)]
        return Size(
            given=self._together.features[layer][0].numel(),
            returned=self._together.taps[layer][0].numel(),
            gradients=sum(parameter.numel() for parameter in chosen),
            reduces=not isinstance(self._module.get_submodule(layer), SUMS),
        )

    def _same_row(self, layer: str, index: int, alone: Watch) -> bool:
        if not alone.once(layer, 1):
            return False
        row, same = self._together.features[layer][index], alone.features[layer][0]
        tolerance = 1e-3 * float(row.abs().max())
        return row.shape == same.shape and torch.allclose(same, row, rtol=0, atol=tolerance, equal_nan=True)


def _candidates(module: nn.Module, names: list[str]) -> list[str]:
    owners = Counter(id(p) for part in module.modules() for p in part.parameters(recurse=False))
    return [
        name
        for name, part in module.named_modules()
        if type(part) in KINDS
        and kinds(name, names)
        and all(owners[id(p)] == 1 for p in part.parameters(recurse=False))
        # no weights computed on the way, and nothing between the layer and its output
        and set(dict(part.named_parameters(recurse=False))) <= {"weight", "bias"}
        and "weight" in dict(part.named_parameters(recurse=False))
        and not part._forward_hooks and not part._forward_pre_hooks and "forward" not in vars(part)
    ]  # fmt: skip


def kinds(layer: str, names: list[str]) -> list[str]:
    """Return which of a layer's weight and bias are among the names."""
    return [kind for kind in ("weight", "bias") if f"{layer}.{kind}" in names]


class Watch:
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
            if layer not in self.taps:
                nothing = torch.zeros((), dtype=output.dtype, device=output.device)
                self.taps[layer] = nothing.expand_as(output).requires_grad_()
            # the same one when a layer runs again, as it does under checkpointing; elsewhere its output may be another
            return output + self.taps[layer] if output.shape == self.taps[layer].shape else output

        return note

    def once(self, layer: str, samples: int) -> bool:
        """Whether the layer ran once, on one row a sample that has not been changed in place since."""
        return (
            self.calls[layer] == 1
            and len(self.features[layer]) == samples
            and self.features[layer]._version == self._versions[layer]
        )


@contextmanager
def watched(module: nn.Module, layers: Iterable[str], watch: Watch) -> Iterator[None]:
    """Watch these layers for a while."""
    hooks = [module.get_submodule(layer).register_forward_hook(watch.hook(layer)) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
