r"""Layers whose parameter gradients are computed from the layer's input and the gradient of its output.

This is the whole gradient only if the layer runs once, on one row per sample, and shares no weights. A forward pass of
a few samples shows whether it does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stepwise_lightning.theory.ntk.functional_module import FunctionalModule
from stepwise_lightning.theory.ntk.layer_kernels import LAYER_TYPES, MATRIX_LAYERS, LayerSize, layer_inputs

# Sizes by layer name.
LayerSizes = dict[str, LayerSize]


class NotLayerwiseError(Exception):
    """A layer does not run once on one row per sample, unlike on the checked samples; caught by EmpiricalNTK."""


class LayerCandidates:
    """Find the layers of `LAYER_TYPES` that run once, on one row per sample, and share no weights.

    One forward pass runs with the layer outputs detached from the weights. A weight that still has a gradient is used
    elsewhere, and an output that depends on another sample's row of a layer is not in the order of the samples.
    ``layers`` are the names of the candidates, ``parameters`` leaf copies of their parameters for this pass.
    """

    def __init__(self, network: FunctionalModule) -> None:
        self._module, self._names = network.module, network.names
        self.layers = _candidates(network.module, network.names)
        self.parameters = {
            name: network.state[name].detach().requires_grad_()
            for layer in self.layers
            for name in (f"{layer}.weight", f"{layer}.bias")
            if name in network.state
        }
        self._batch = LayerRecorder(add_probes=True, detach_weights=True)
        self._rejected: set[str] = set()

    @contextmanager
    def record_batch(self, num_samples: int) -> Iterator[None]:
        """Record a batch, with layer outputs detached from the weights."""
        with self._batch.attach(self._module, self.layers):
            yield
        self._rejected |= {layer for layer in self.layers if not self._batch.ran_once(layer, num_samples)}

    @contextmanager
    def record_single_sample(self, index: int) -> Iterator[None]:
        """Record the batch's sample ``index`` alone and reject layers with another input than in the batch."""
        recorder = LayerRecorder()
        with recorder.attach(self._module, self.layers):
            yield
        for layer in set(self.layers) - self._rejected:
            in_batch = self._batch.inputs[layer][index]
            if not recorder.ran_once(layer, 1) or not _same_inputs(recorder.inputs[layer][0], in_batch):
                self._rejected.add(layer)

    def find_other_uses(self, outputs: Tensor) -> Tensor:
        """Find shared weights and reordered rows by gradients of the recorded outputs, (k, d); return them detached."""
        probes, weights = self._batch.probes, self.parameters
        tensors = [*probes.values(), *weights.values()]
        # checking two rows is enough: a permutation of three samples moves one or both
        for index in range(min(2, len(outputs)) if outputs.requires_grad and tensors else 0):
            gradients = torch.autograd.grad(outputs[index].sum(), tensors, retain_graph=True, allow_unused=True)
            for layer, gradient in zip(probes, gradients, strict=False):
                others = [row for row in range(len(outputs)) if row != index]
                if gradient is not None and len(gradient) == len(outputs) and gradient[others].any():
                    self._rejected.add(layer)
            for name, gradient in zip(weights, gradients[len(probes) :], strict=True):
                if gradient is not None:
                    self._rejected.add(name.rpartition(".")[0])
        return outputs.detach()

    def layerwise(self) -> LayerSizes:
        """Return the sizes of the layers that passed all checks."""
        return {layer: self._size(layer) for layer in self.layers if layer not in self._rejected}

    def _size(self, layer: str) -> LayerSize:
        return LayerSize(
            inputs=self._batch.inputs[layer][0].numel(),
            outputs=self._batch.probes[layer][0].numel(),
            gradients=sum(self.parameters[f"{layer}.{kind}"].numel() for kind in chosen_kinds(layer, self._names)),
            per_channel=not isinstance(self._module.get_submodule(layer), MATRIX_LAYERS),
        )


def _same_inputs(alone: Tensor, in_batch: Tensor) -> bool:
    tolerance = 1e-3 * float(in_batch.abs().max())
    return alone.shape == in_batch.shape and torch.allclose(alone, in_batch, rtol=0, atol=tolerance, equal_nan=True)


def _candidates(module: nn.Module, names: list[str]) -> list[str]:
    owners = Counter(id(p) for layer in module.modules() for p in layer.parameters(recurse=False))
    return [
        name
        for name, layer in module.named_modules()
        if type(layer) in LAYER_TYPES
        and chosen_kinds(name, names)
        and all(owners[id(p)] == 1 for p in layer.parameters(recurse=False))
        # no parametrisations
        and {"weight"} <= set(dict(layer.named_parameters(recurse=False))) <= {"weight", "bias"}
        and not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))
    ]


def chosen_kinds(layer: str, names: list[str]) -> list[str]:
    """Return "weight", "bias" or both: the kinds of a layer's parameters that are among the names."""
    return [kind for kind in ("weight", "bias") if f"{layer}.{kind}" in names]


class LayerRecorder:
    """Record :func:`layer_inputs` by layer in one forward pass.

    With ``add_probes``, zeros are added to each layer output; their gradient is the gradient of the output. With
    ``detach_weights``, each layer output depends on the layer input only, not on the weights, at equal value.
    """

    def __init__(self, add_probes: bool = False, detach_weights: bool = False) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.probes: dict[str, Tensor] = {}
        self._num_calls: Counter[str] = Counter()
        self._versions: dict[str, int] = {}
        self._add_probes, self._detach_weights = add_probes, detach_weights

    @contextmanager
    def attach(self, module: nn.Module, layers: Iterable[str]) -> Iterator[None]:
        """Record these layers inside this context."""
        with ExitStack() as handles:
            for name in layers:
                handles.enter_context(module.get_submodule(name).register_forward_hook(partial(self._hook, name)))
            yield

    def _hook(self, name: str, layer: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        self._num_calls[name] += 1
        inputs = layer_inputs(layer, args[0]) if args else None
        if inputs is None:
            self._num_calls[name] += 1  # ran_once is False
            return None
        if name not in self.inputs:
            self.inputs[name], self._versions[name] = inputs, inputs._version
        if not self._add_probes:
            return None
        if self._detach_weights:
            dependence = (args[0] - args[0].detach()).flatten(1).sum(1)
            output = output.detach() + dependence.view(-1, *[1] * (output.ndim - 1))
        if name not in self.probes:
            zero = torch.zeros((), dtype=output.dtype, device=output.device)
            self.probes[name] = zero.expand_as(output).requires_grad_()
        # activation checkpointing runs the layer again and needs the same probe; other reuse may change the shape
        return output + self.probes[name] if output.shape == self.probes[name].shape else output

    def ran_once(self, layer: str, num_samples: int) -> bool:
        """Whether the layer ran once, on one row per sample, and its input was not changed in place afterwards."""
        return (
            self._num_calls[layer] == 1
            and len(self.inputs[layer]) == num_samples
            and self.inputs[layer]._version == self._versions[layer]
        )
