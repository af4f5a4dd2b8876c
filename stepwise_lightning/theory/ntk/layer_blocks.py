"""Tangent kernel of all layer-wise layers, in blocks that fit a memory bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepwise_lightning.theory.ntk.functional_module import FunctionalModule
from stepwise_lightning.theory.ntk.layer_kernels import LayerTensors, layer_kernel, parameter_gradients
from stepwise_lightning.theory.ntk.layers import LayerRecorder, LayerSizes, NotLayerwiseError, chosen_kinds
from stepwise_lightning.theory.progress import progress_bar

# Outputs, or samples, in a pass; more of them save little.
_ENOUGH = 8


def min_numbers(layers: LayerSizes) -> int:
    """Return the minimum numbers to store for each sample of a pair."""
    largest = max((size.stored(1) for size in layers.values()), default=0)
    return -(-(3 * (largest + 1) + _numbers_in_pass(layers, 1)) // 2) + 1


def layerwise_kernel(
    network: FunctionalModule,
    layers: LayerSizes,
    x: Tensor,
    y: Tensor,
    num_outputs: int,
    max_batch: int,
    max_bytes: int,
) -> Tensor:
    """Return Σ_o ⟨J_o(x), J_o(y)⟩ for the chosen parameters of these layers, (k, l), float64.

    Blocks hold as many samples as possible, then as many layers as fit: splitting layers costs as many passes through
    the network as splitting samples, but results that samples share are then computed once. Raises NotLayerwiseError if
    a layer does not run once on one row per sample.
    """
    max_numbers = max_bytes // network.dtype.itemsize
    plan = _plan(layers, num_outputs, min(max_batch, max(len(x), len(y))), x is y, max_numbers)
    kernel = torch.zeros(len(x), len(y), dtype=torch.float64, device=x.device)
    groups = _group_layers(layers, plan)
    blocks = range(0, len(x), plan.rows)  # of rows; each computes the samples of its rows and columns
    samples = sum(len(x) - i for i in blocks) if x is y else len(x) + len(blocks) * len(y)
    with progress_bar("tangent kernel", "gradient", len(groups) * num_outputs * samples) as bar:
        for group in groups:
            for start in range(0, num_outputs, plan.outputs):
                block = _LayerGroup(network, group, slice(start, start + plan.outputs), plan, bar.update)
                add_blocks(kernel, x, y, plan.rows, block.tensors, block.kernel)
    return kernel


def add_blocks(
    kernel: Tensor, x: Tensor, y: Tensor, rows: int, compute: Callable[[Tensor], Any], contract: Callable[..., Tensor]
) -> None:
    """Add contract(compute(x), compute(y)) to a kernel, (k, l), in blocks of samples; if x is y, half is computed."""
    for i in range(0, len(x), rows):
        left = compute(x[i : i + rows])
        for j in range(i if x is y else 0, len(y), rows):
            right = left if x is y and i == j else compute(y[j : j + rows])
            block = contract(left, right)
            kernel[i : i + rows, j : j + rows] += block
            if x is y and i != j:
                kernel[j : j + rows, i : i + rows] += block.T
            del right  # free its memory before the next block
        del left


@dataclass(frozen=True)
class _Plan:
    """Outputs and kernel rows in a block, samples in a pass, and numbers to store for a row and for temporary results.

    A quarter of the memory is for passes, and a third of the rest for temporary results.
    """

    outputs: int
    rows: int
    batch: int
    numbers_per_row: int
    temporary: int  # for each side


def _plan(layers: LayerSizes, num_outputs: int, max_batch: int, symmetric: bool, max_numbers: int) -> _Plan:
    outputs = num_outputs
    while True:
        numbers_in_pass = _numbers_in_pass(layers, outputs)
        batch = max(1, min(max_batch, max_numbers // (4 * numbers_in_pass)))
        remaining = max_numbers - batch * numbers_in_pass
        temporary = remaining // 6
        largest = max(size.stored(outputs) for size in layers.values())
        rows = (remaining - 2 * temporary) // largest
        sides = 1 if symmetric and rows >= max_batch else 2
        rows = min(rows // sides, max_batch)
        # all outputs only if all samples fit with them
        enough = rows >= (max_batch if outputs > _ENOUGH else 1) and batch >= min(max_batch, _ENOUGH)
        if enough or outputs == 1:
            rows = max(1, rows)
            return _Plan(outputs, rows, batch, (remaining - 2 * temporary) // (sides * rows), temporary)
        outputs = -(-outputs // 2)


def _numbers_in_pass(layers: LayerSizes, num_outputs: int) -> int:
    """Return an estimate of the numbers per sample in a forward pass and backward passes from some outputs."""
    return max(1, sum(size.inputs + (num_outputs + 1) * size.outputs for size in layers.values()))


def _group_layers(layers: LayerSizes, plan: _Plan) -> list[LayerSizes]:
    """Return consecutive groups of layers that fit the memory of a block."""
    groups: list[LayerSizes] = []
    used = plan.numbers_per_row
    for layer, size in layers.items():
        used += size.stored(plan.outputs)
        if used > plan.numbers_per_row:
            groups.append({})
            used = size.stored(plan.outputs)
        groups[-1][layer] = size
    return groups


class _LayerGroup:
    """Tensors and kernels of some layers for a slice of the outputs."""

    def __init__(
        self,
        network: FunctionalModule,
        layers: LayerSizes,
        outputs: slice,
        plan: _Plan,
        count_gradients: Callable[[int], Any],
    ) -> None:
        self._network, self._outputs, self._plan, self._count_gradients = network, outputs, plan, count_gradients
        self._layers = {layer: network.module.get_submodule(layer) for layer in layers}
        self._kinds = {layer: chosen_kinds(layer, network.names) for layer in layers}
        self._stores_gradients = {layer: size.stores_gradients(plan.outputs) for layer, size in layers.items()}

    def tensors(self, x: Tensor) -> list[LayerTensors | Tensor]:
        """Return gradients or `LayerTensors` of each layer for samples (k, …)."""
        passes = [self._run(batch) for batch in x.split(self._plan.batch)]
        # pop frees the parts of a layer when they are joined
        return passes[0] if len(passes) == 1 else [_join([layers.pop(0) for layers in passes]) for _ in self._layers]

    def kernel(self, left: list[LayerTensors | Tensor], right: list[LayerTensors | Tensor]) -> Tensor:
        """Return the sum of the layer kernels, (k, l)."""
        kernels = [
            layer_kernel(layer, self._kinds[name], a, b, self._plan.temporary)
            for (name, layer), a, b in zip(self._layers.items(), left, right, strict=True)
        ]
        return torch.stack(kernels).sum(0)

    def _run(self, x: Tensor) -> list[LayerTensors | Tensor]:
        recorder = LayerRecorder(add_probes=True)

        def backward(outputs: Tensor) -> list[Sequence[Tensor]]:
            if not all(recorder.ran_once(layer, len(x)) for layer in self._layers):
                raise NotLayerwiseError
            probes = [recorder.probes[layer] for layer in self._layers]
            # samples do not mix, and the gradient of their sum consists of the gradients of each
            sums = outputs.sum(0)[self._outputs]
            if not outputs.requires_grad:
                return [[torch.zeros_like(probe) for probe in probes]] * len(sums)
            gradients: list[Sequence[Tensor]] = []
            for output in sums:
                gradients.append(torch.autograd.grad(output, probes, retain_graph=True, materialize_grads=True))
                self._count_gradients(len(x))
            return gradients

        with torch.enable_grad(), recorder.attach(self._network.module, self._layers):
            deltas = self._network(x, callback=backward)
        return [
            self._reduce(layer, (recorder.inputs[layer], list(layer_deltas)))
            for layer, layer_deltas in zip(self._layers, zip(*deltas, strict=True), strict=True)
        ]

    def _reduce(self, layer: str, tensors: LayerTensors) -> LayerTensors | Tensor:
        if not self._stores_gradients[layer]:
            return tensors
        return parameter_gradients(self._layers[layer], self._kinds[layer], tensors, self._plan.temporary)


def _join(parts: Sequence[LayerTensors | Tensor]) -> LayerTensors | Tensor:
    """Concatenate the tensors of several batches."""
    if isinstance(parts[0], Tensor):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    inputs, deltas = zip(*parts, strict=True)
    return torch.cat(inputs), [torch.cat(output_deltas) for output_deltas in zip(*deltas, strict=True)]
