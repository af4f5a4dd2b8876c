r"""The share of one layer's parameters in a tangent kernel, from what it is given and the gradients of its output.

A linear layer or a convolution adds W a_p + b at each position p of a sample (one for a vector, the tokens of a
sequence, the pixels of an image), where a_p is the part of its input that it sees there. With δ_op the gradient of
output o with respect to the layer's output at p, the share of its weights is

    Σ_o Σ_pp' (δ_op(x)·δ_op'(y)) (a_p(x)·a_p'(y)) = Σ_o ⟨Σ_p δ_op(x) a_pᵀ(x), Σ_p' δ_op'(y) a_p'ᵀ(y)⟩,

and that of its biases the same with 1 for a·a. The left side multiplies positions, the right side gradients: the one
is cheap where positions are few, as for vectors and late in a network, the other where weights are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import isqrt, prod

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# What a layer is given, as `features` has it, and the gradients of some outputs with respect to its own.
Part = tuple[Tensor, list[Tensor]]

_CONVOLUTIONS: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
# What sums over its input, and has a weight for each pair of channels; the others scale each channel.
SUMS: tuple[type[nn.Module], ...] = (nn.Linear, *_CONVOLUTIONS)
KINDS = {*SUMS, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm}

# Multiplications that take as long as to read and add up one product of two positions.
_TO_ADD_UP = 16
# Numbers in a tile at most, so that it is still in cache when it is used.
_TILE = 2**22
# Terms of a sum in the precision of the gradients; sums of these are float64.
_TERMS = 2**13
# Rows below which a symmetric product takes no longer than half of it, in pieces.
_FEW = 128


def features(layer: nn.Module, x: Tensor) -> Tensor | None:
    """Return what the gradients of a layer's parameters are made of, (k, …); None for an input without samples.

    That is the input, and for a normalisation the normalised input.
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
class Size:
    """How many numbers a sample has in a layer's features, in its output, and in its gradients of one output."""

    given: int
    returned: int
    gradients: int
    reduces: bool  # whether gradients are no larger than the output

    def compact(self, outputs: int) -> bool:
        """Whether to hold gradients themselves, of so many outputs, instead of what they are made of."""
        return self.reduces or outputs * self.gradients <= self.given + outputs * self.returned

    def held(self, outputs: int) -> int:
        """Return how many numbers that takes."""
        return outputs * self.gradients if self.compact(outputs) else self.given + outputs * self.returned


def gradients(layer: nn.Module, chosen: Collection[str], part: Part, room: int) -> Tensor:
    """Return the gradients of some outputs with respect to a layer's chosen "weight" and "bias", (k, …)."""
    given, deltas = part
    if isinstance(layer, SUMS):
        columns = torch.cat([_columns(layer, delta) for delta in deltas], 3)
        of_weight = [_of_weight(layer, given, columns, room)] if "weight" in chosen else []
        return torch.cat([*of_weight, *([columns.sum(2).flatten(1)] if "bias" in chosen else [])], 1)
    products = [delta * given for delta in deltas] if "weight" in chosen else []
    products += deltas if "bias" in chosen else []
    if isinstance(layer, nn.LayerNorm):
        size = prod(layer.normalized_shape)
        return torch.cat([product.reshape(len(given), -1, size).sum(1) for product in products], 1)
    return torch.cat([product.flatten(2).sum(2) if given.ndim > 2 else product for product in products], 1)


def share(layer: nn.Module, chosen: Collection[str], left: Part | Tensor, right: Part | Tensor, room: int) -> Tensor:
    """Return Σ_o ⟨J_o(x), J_o(y)⟩ of a layer's weight, bias or both, (k, l), float64.

    Args:
        layer: one of `KINDS`.
        chosen: what counts, "weight", "bias" or both.
        left: its gradients (k, …); or of a linear layer or convolution what they are made of, if its weight counts.
        right: the same of other samples, or the same object, of which half is computed then.
        room: how many numbers may be held on the way, for each side.

    """
    if isinstance(left, Tensor):
        assert isinstance(right, Tensor)
        return product(left, right)
    assert not isinstance(right, Tensor)
    tile = min(room // 4, _TILE)  # a few are held together
    if _positions_are_cheaper(layer, left, right, tile):
        return _by_positions(layer, "bias" in chosen, left, right, tile)
    kernel = _by_gradients(layer, left, right, room)
    if "bias" in chosen:
        sums = gradients(layer, ["bias"], left, room)
        kernel += product(sums, sums if left is right else gradients(layer, ["bias"], right, room))
    return kernel


def _positions(layer: nn.Module, part: Part) -> int:
    return _columns(layer, part[1][0][:1]).shape[2]


def _positions_are_cheaper(layer: nn.Module, left: Part, right: Part, room: int) -> bool:
    """Compare multiplications, of all samples and one group of channels."""
    samples, others = len(left[0]), len(right[0])
    _, groups, positions, channels = _columns(layer, left[1][0][:1]).shape
    channels, taken, other_positions = channels * len(left[1]), _taken(layer), _positions(layer, right)
    if groups * positions * other_positions > room:
        return positions * other_positions == 1
    by_positions = samples * others * positions * other_positions * (taken + channels + _TO_ADD_UP)
    to_form = samples * positions + (0 if left is right else others * other_positions)
    return by_positions <= channels * taken * (samples * others + to_form)


def _by_positions(layer: nn.Module, bias: bool, left: Part, right: Part, room: int) -> Tensor:
    kernel = torch.empty(len(left[0]), len(right[0]), dtype=torch.float64, device=left[0].device)
    positions, other_positions = _positions(layer, left), _positions(layer, right)
    groups = _columns(layer, left[1][0][:1]).shape[1]
    # an image of y may have another size than one of x
    side = max(1, isqrt(room // groups) // max(positions, other_positions))
    for rows, columns in _tiles(len(left[0]), len(right[0]), side, left is right):
        mirrored = left is right and rows == columns

        def matrix(values: Tensor) -> Tensor:  # positions of all samples below each other
            return values.movedim(1, 0).flatten(1, 2)

        given = matrix(_seen(layer, left[0][rows]))
        seen = given @ (given if mirrored else matrix(_seen(layer, right[0][columns]))).mT
        seen = seen + 1 if bias else seen
        products = torch.zeros_like(seen)
        for delta, other in zip(left[1], right[1], strict=True):
            a = matrix(_columns(layer, delta[rows]))
            products.baddbmm_(a, (a if mirrored else matrix(_columns(layer, other[columns]))).mT)
        products *= seen
        shape = (rows.stop - rows.start, positions, columns.stop - columns.start, other_positions)
        block = products.sum(0).view(shape).sum((1, 3)).double()
        kernel[rows, columns] = block
        if left is right and not mirrored:
            kernel[columns, rows] = block.T
    return kernel


def _by_gradients(layer: nn.Module, left: Part, right: Part, room: int) -> Tensor:
    kernel = torch.zeros(len(left[0]), len(right[0]), dtype=torch.float64, device=left[0].device)
    sides = [left] if left is right else [left, right]
    columns = [torch.cat([_columns(layer, delta) for delta in deltas], 3) for _, deltas in sides]
    _, groups, _, channels = columns[0].shape
    at_once = max(1, room // (max(kernel.shape) * groups * _taken(layer)))
    for start in range(0, channels, at_once):
        of_weight = [
            _of_weight(layer, given, some[..., start : start + at_once], room)
            for (given, _), some in zip(sides, columns, strict=True)
        ]
        kernel += product(of_weight[0], of_weight[-1])
    return kernel


def _of_weight(layer: nn.Module, given: Tensor, deltas: Tensor, room: int) -> Tensor:
    """Return Σ_p δ_p a_pᵀ of each sample, (k, …), for the columns (k, groups, positions, …) of δ."""
    samples, groups, positions, channels = deltas.shape
    result = deltas.new_empty(samples * groups, channels, _taken(layer))
    numbers = groups * positions * _taken(layer)
    at_once = max(1, min(room, _TILE) // numbers)
    for start in range(0, samples, at_once):
        rows, first = slice(start, start + at_once), 0
        for seen in _in_strips(layer, given[rows], numbers, min(room, _TILE)):
            strip = deltas[rows, :, first : first + seen.shape[2]]
            result[start * groups : (start + at_once) * groups].baddbmm_(
                strip.flatten(0, 1).mT, seen.flatten(0, 1), beta=1 if first else 0
            )
            first += seen.shape[2]
    return result.view(samples, -1)


def _in_strips(layer: nn.Module, given: Tensor, numbers: int, room: int) -> Iterator[Tensor]:
    """Return what a layer sees, (k, groups, positions, …), some positions after the other where one sample is large."""
    if isinstance(layer, nn.Linear):
        yield _seen(layer, given)
        return
    view = _windows(layer, given)
    height = max(1, view.shape[2] * room // numbers) if len(given) == 1 else view.shape[2]
    for strip in view.split(height, 2):
        yield _flattened(layer, strip)


def _columns(layer: nn.Module, delta: Tensor) -> Tensor:
    """Return gradients with respect to a layer's output as (k, groups, positions, channels of a group)."""
    if isinstance(layer, nn.Linear):
        return delta.reshape(len(delta), 1, -1, delta.shape[-1])
    assert isinstance(layer, nn.modules.conv._ConvNd)
    return delta.unflatten(1, (layer.groups, -1)).flatten(3).mT


def _seen(layer: nn.Module, given: Tensor) -> Tensor:
    """Return what a layer sees at each position, (k, groups, positions, numbers seen)."""
    if isinstance(layer, nn.Linear):
        return given.reshape(len(given), 1, -1, given.shape[-1])
    return _flattened(layer, _windows(layer, given))


def _flattened(layer: nn.Module, windows: Tensor) -> Tensor:
    axes = _CONVOLUTIONS[type(layer)]
    return windows.reshape(*windows.shape[:2], prod(windows.shape[2 : 2 + axes]), -1)


def _windows(layer: nn.Module, given: Tensor) -> Tensor:
    """Return a view of all windows of a convolution, (k, groups, *positions, *kernel, channels of a group)."""
    assert isinstance(layer, nn.modules.conv._ConvNd)
    if any(layer._reversed_padding_repeated_twice):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        given = F.pad(given, layer._reversed_padding_repeated_twice, mode)
    given = given.movedim(1, -1).contiguous()  # channels last, for long runs in memory
    axes = list(
        zip(given.shape[1:-1], given.stride()[1:-1], layer.kernel_size, layer.stride, layer.dilation, strict=True)
    )
    channels = given.shape[-1] // layer.groups
    sizes = [(size - dilation * (width - 1) - 1) // step + 1 for size, _, width, step, dilation in axes]
    return given.as_strided(
        (len(given), layer.groups, *sizes, *layer.kernel_size, channels),
        (
            given.stride(0),
            channels,
            *(stride * step for _, stride, _, step, _ in axes),
            *(stride * dilation for _, stride, _, _, dilation in axes),
            1,
        ),
    )


def _taken(layer: nn.Module) -> int:
    """Return how many numbers a layer sees at a position, in one group of channels."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    assert isinstance(layer, nn.modules.conv._ConvNd)
    return layer.in_channels // layer.groups * prod(layer.kernel_size)


def _tiles(rows: int, columns: int, side: int, symmetric: bool) -> Iterator[tuple[slice, slice]]:
    """Return what tiles a matrix, without those below the diagonal if it is symmetric."""
    side = min(side, max(_FEW, -(-rows // 4))) if symmetric else side
    for i in range(0, rows, side):
        for j in range(i if symmetric else 0, columns, side):
            yield slice(i, min(i + side, rows)), slice(j, min(j + side, columns))


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return left rightᵀ in float64, half of it computed where both are the same object."""
    kernel = torch.zeros(len(left), len(right), dtype=torch.float64, device=left.device)
    for rows, columns in _tiles(len(left), len(right), max(len(left), len(right)), left is right):
        # some after the other, because a sum of millions of terms has fewer digits in float32
        for a, b in zip(left[rows].split(_TERMS, 1), right[columns].split(_TERMS, 1), strict=True):
            kernel[rows, columns] += a @ b.T
        if left is right and rows != columns:
            kernel[columns, rows] = kernel[rows, columns].T
    return kernel
