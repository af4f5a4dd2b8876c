r"""Tangent kernel of one layer's parameters, from the layer's inputs and the gradients of its outputs.

A linear layer or a convolution returns W a_p + b at each position p of a sample (one position for a vector, the tokens
of a sequence, the pixels of an image), where a_p is the patch of its input at p. With δ_op the gradient of network
output o with respect to the layer's output at p, the kernel of the weights is

    Σ_o Σ_pp' (δ_op(x)·δ_op'(y)) (a_p(x)·a_p'(y)) = Σ_o ⟨Σ_p δ_op(x) a_pᵀ(x), Σ_p' δ_op'(y) a_p'ᵀ(y)⟩,

and the kernel of the biases is the same with 1 for a·a. The left side multiplies positions and is cheap if they are
few, as for vectors and late in a network; the right side multiplies gradients and is cheap if the weights are few.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import isqrt, prod

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# Layer inputs from `layer_inputs`, (k, …), and gradients of network outputs by the layer output, (k, …) each.
LayerTensors = tuple[Tensor, list[Tensor]]

_CONVOLUTIONS: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
# Layers with a weight for each pair of channels; the other types scale each channel.
MATRIX_LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *_CONVOLUTIONS)
LAYER_TYPES = {*MATRIX_LAYERS, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm}

# Cost of reading and adding one product of two positions, in multiplications.
_ADD_COST = 16
# Maximum numbers in a tile, small enough for the cache.
_TILE = 2**22
# Maximum terms of a sum in the precision of the gradients; these sums are added in float64.
_TERMS = 2**13
# Rows below which half of a symmetric product, in blocks, is not faster than the whole.
_MIN_SYMMETRIC_ROWS = 128


def layer_inputs(layer: nn.Module, x: Tensor) -> Tensor | None:
    """Return the factor of a layer's gradients that depends on its input x, (k, …); None for an input without samples.

    This is the input or, for a normalisation layer, the normalised input.
    """
    if type(layer) in _CONVOLUTIONS and x.ndim != 2 + _CONVOLUTIONS[type(layer)] or x.ndim < 2:
        return None
    x = x.detach()
    if isinstance(layer, _BatchNorm):
        return F.batch_norm(x, layer.running_mean, layer.running_var, eps=layer.eps)
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(x, layer.num_groups, eps=layer.eps)
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x, layer.normalized_shape, eps=layer.eps) if x.ndim > len(layer.normalized_shape) else None
    return x


@dataclass(frozen=True)
class LayerSize:
    """Numbers per sample in a layer's inputs, its outputs, and the gradients of one network output."""

    inputs: int
    outputs: int
    gradients: int
    per_channel: bool  # normalisation layers, whose gradients are no larger than their output

    def stores_gradients(self, num_outputs: int) -> bool:
        """Whether parameter gradients take less memory than `LayerTensors`, for so many network outputs."""
        return self.per_channel or num_outputs * self.gradients <= self.inputs + num_outputs * self.outputs

    def stored(self, num_outputs: int) -> int:
        """Return how many numbers to store for a sample."""
        if self.stores_gradients(num_outputs):
            return num_outputs * self.gradients
        return self.inputs + num_outputs * self.outputs


def parameter_gradients(layer: nn.Module, kinds: Collection[str], tensors: LayerTensors, max_numbers: int) -> Tensor:
    """Return the gradients of network outputs with respect to a layer's "weight", "bias" or both, (k, …)."""
    inputs, deltas = tensors
    if isinstance(layer, MATRIX_LAYERS):
        columns = torch.cat([_by_group(layer, delta) for delta in deltas], 3)
        weight = [_weight_gradients(layer, inputs, columns, max_numbers)] if "weight" in kinds else []
        return torch.cat([*weight, *([columns.sum(2).flatten(1)] if "bias" in kinds else [])], 1)
    products = [delta * inputs for delta in deltas] if "weight" in kinds else []
    products += deltas if "bias" in kinds else []
    if isinstance(layer, nn.LayerNorm):
        size = prod(layer.normalized_shape)
        return torch.cat([product.reshape(len(inputs), -1, size).sum(1) for product in products], 1)
    return torch.cat([product.flatten(2).sum(2) if inputs.ndim > 2 else product for product in products], 1)


def layer_kernel(
    layer: nn.Module,
    kinds: Collection[str],
    left: LayerTensors | Tensor,
    right: LayerTensors | Tensor,
    max_numbers: int,
) -> Tensor:
    """Return Σ_o ⟨J_o(x), J_o(y)⟩ for a layer's "weight", "bias" or both, (k, l), float64.

    ``left`` and ``right`` are parameter gradients or, for linear layers and convolutions with a weight, `LayerTensors`.
    If they are one object, half is computed. ``max_numbers`` bounds the temporary results of each side.
    """
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        assert isinstance(left, Tensor) and isinstance(right, Tensor)
        return inner_products(left, right)
    max_tile = min(max_numbers // 4, _TILE)  # up to four tiles exist at once
    if _positions_are_cheaper(layer, left, right, max_tile):
        return _kernel_by_positions(layer, "bias" in kinds, left, right, max_tile)
    kernel = _kernel_by_gradients(layer, left, right, max_numbers)
    if "bias" in kinds:
        bias = parameter_gradients(layer, ["bias"], left, max_numbers)
        other = bias if left is right else parameter_gradients(layer, ["bias"], right, max_numbers)
        kernel += inner_products(bias, other)
    return kernel


def _positions_are_cheaper(layer: nn.Module, left: LayerTensors, right: LayerTensors, max_tile: int) -> bool:
    """Compare the multiplications of both sides of the equation above, for all samples and one group of channels."""
    samples, others = len(left[0]), len(right[0])
    _, groups, positions, channels = _by_group(layer, left[1][0][:1]).shape
    channels, patch, other_positions = channels * len(left[1]), _patch_size(layer), _num_positions(layer, right)
    if groups * positions * other_positions > max_tile:
        return positions * other_positions == 1
    by_positions = samples * others * positions * other_positions * (patch + channels + _ADD_COST)
    form_gradients = samples * positions + (0 if left is right else others * other_positions)
    return by_positions <= channels * patch * (samples * others + form_gradients)


def _kernel_by_positions(
    layer: nn.Module, bias: bool, left: LayerTensors, right: LayerTensors, max_tile: int
) -> Tensor:
    kernel = torch.empty(len(left[0]), len(right[0]), dtype=torch.float64, device=left[0].device)
    positions, other_positions = _num_positions(layer, left), _num_positions(layer, right)
    groups = _by_group(layer, left[1][0][:1]).shape[1]
    # images of x and y may differ in size
    side = max(1, isqrt(max_tile // groups) // max(positions, other_positions))
    for rows, columns in _tiles(len(left[0]), len(right[0]), side, left is right):
        on_diagonal = left is right and rows == columns
        patches = _samples_to_rows(_patches(layer, left[0][rows]))
        input_products = patches @ (patches if on_diagonal else _samples_to_rows(_patches(layer, right[0][columns]))).mT
        input_products = input_products + 1 if bias else input_products
        products = torch.zeros_like(input_products)
        for delta, other in zip(left[1], right[1], strict=True):
            a = _samples_to_rows(_by_group(layer, delta[rows]))
            products.baddbmm_(a, (a if on_diagonal else _samples_to_rows(_by_group(layer, other[columns]))).mT)
        products *= input_products
        shape = (rows.stop - rows.start, positions, columns.stop - columns.start, other_positions)
        block = products.sum(0).view(shape).sum((1, 3)).double()
        kernel[rows, columns] = block
        if left is right and not on_diagonal:
            kernel[columns, rows] = block.T
    return kernel


def _kernel_by_gradients(layer: nn.Module, left: LayerTensors, right: LayerTensors, max_numbers: int) -> Tensor:
    kernel = torch.zeros(len(left[0]), len(right[0]), dtype=torch.float64, device=left[0].device)
    sides = [left] if left is right else [left, right]
    columns = [torch.cat([_by_group(layer, delta) for delta in deltas], 3) for _, deltas in sides]
    _, groups, _, channels = columns[0].shape
    step = max(1, max_numbers // (max(kernel.shape) * groups * _patch_size(layer)))
    for start in range(0, channels, step):
        gradients = [
            _weight_gradients(layer, inputs, deltas[..., start : start + step], max_numbers)
            for (inputs, _), deltas in zip(sides, columns, strict=True)
        ]
        kernel += inner_products(gradients[0], gradients[-1])
    return kernel


def _weight_gradients(layer: nn.Module, inputs: Tensor, deltas: Tensor, max_numbers: int) -> Tensor:
    """Return Σ_p δ_p a_pᵀ of each sample, (k, …), for δ of shape (k, groups, positions, …)."""
    samples, groups, positions, channels = deltas.shape
    result = deltas.new_empty(samples * groups, channels, _patch_size(layer))
    numbers, max_tile = groups * positions * _patch_size(layer), min(max_numbers, _TILE)
    step = max(1, max_tile // numbers)
    for start in range(0, samples, step):
        rows, first = slice(start, start + step), 0
        windows = _windows(layer, inputs[rows])
        # strips of positions if one sample exceeds the tile
        split = len(windows) == 1 and not isinstance(layer, nn.Linear)
        height = max(1, windows.shape[2] * max_tile // numbers) if split else windows.shape[2]
        for patches in (_flatten_windows(layer, strip) for strip in windows.split(height, 2)):
            strip = deltas[rows, :, first : first + patches.shape[2]]
            result[start * groups : (start + step) * groups].baddbmm_(
                strip.flatten(0, 1).mT, patches.flatten(0, 1), beta=1 if first else 0
            )
            first += patches.shape[2]
    return result.view(samples, -1)


def _by_group(layer: nn.Module, delta: Tensor) -> Tensor:
    """Return gradients by a layer's output as (k, groups, positions, channels of a group)."""
    if isinstance(layer, nn.Linear):
        return delta.reshape(len(delta), 1, -1, delta.shape[-1])
    assert isinstance(layer, nn.modules.conv._ConvNd)
    return delta.unflatten(1, (layer.groups, -1)).flatten(3).mT


def _num_positions(layer: nn.Module, tensors: LayerTensors) -> int:
    return _by_group(layer, tensors[1][0][:1]).shape[2]


def _samples_to_rows(values: Tensor) -> Tensor:
    """Return (groups, k·positions, …) for (k, groups, positions, …)."""
    return values.movedim(1, 0).flatten(1, 2)


def _patches(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Return a layer's input at each position, (k, groups, positions, patch)."""
    return _flatten_windows(layer, _windows(layer, inputs))


def _flatten_windows(layer: nn.Module, windows: Tensor) -> Tensor:
    axes = _CONVOLUTIONS.get(type(layer), 1)
    return windows.reshape(*windows.shape[:2], prod(windows.shape[2 : 2 + axes]), -1)


def _windows(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Return a view of all windows of a layer, (k, groups, *positions, *kernel, channels of a group)."""
    if isinstance(layer, nn.Linear):
        return inputs.reshape(len(inputs), 1, -1, inputs.shape[-1])
    assert isinstance(layer, nn.modules.conv._ConvNd)
    if any(layer._reversed_padding_repeated_twice):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        inputs = F.pad(inputs, layer._reversed_padding_repeated_twice, mode)
    inputs = inputs.movedim(1, -1).contiguous()  # channels last, for contiguous reads
    steps, kernel, dilations = layer.stride, layer.kernel_size, layer.dilation
    strides, channels = inputs.stride()[1:-1], inputs.shape[-1] // layer.groups
    sizes = [
        (size - dilation * (width - 1) - 1) // step + 1
        for size, dilation, width, step in zip(inputs.shape[1:-1], dilations, kernel, steps, strict=True)
    ]
    position_strides = [stride * step for stride, step in zip(strides, steps, strict=True)]
    kernel_strides = [stride * dilation for stride, dilation in zip(strides, dilations, strict=True)]
    return inputs.as_strided(
        (len(inputs), layer.groups, *sizes, *kernel, channels),
        (inputs.stride(0), channels, *position_strides, *kernel_strides, 1),
    )


def _patch_size(layer: nn.Module) -> int:
    """Return the numbers in one patch, of one group of channels."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    assert isinstance(layer, nn.modules.conv._ConvNd)
    return layer.in_channels // layer.groups * prod(layer.kernel_size)


def _tiles(rows: int, columns: int, side: int, symmetric: bool) -> Iterator[tuple[slice, slice]]:
    """Yield the tiles of a matrix, without those below the diagonal if it is symmetric."""
    side = min(side, max(_MIN_SYMMETRIC_ROWS, -(-rows // 4))) if symmetric else side
    for i in range(0, rows, side):
        for j in range(i if symmetric else 0, columns, side):
            yield slice(i, min(i + side, rows)), slice(j, min(j + side, columns))


def inner_products(left: Tensor, right: Tensor) -> Tensor:
    """Return left rightᵀ in float64; for one object, half is computed."""
    kernel = torch.zeros(len(left), len(right), dtype=torch.float64, device=left.device)
    for rows, columns in _tiles(len(left), len(right), max(len(left), len(right)), left is right):
        # sums of millions of terms lose digits in float32
        for a, b in zip(left[rows].split(_TERMS, 1), right[columns].split(_TERMS, 1), strict=True):
            kernel[rows, columns] += a @ b.T
        if left is right and rows != columns:
            kernel[columns, rows] = kernel[rows, columns].T
    return kernel
