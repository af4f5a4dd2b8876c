"""A few samples on trial: whether a network is a function of one sample, without chance, memory or mixing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stepwise_lightning.errors import UserError, reason
from stepwise_lightning.theory.ntk.functional_module import Network
from stepwise_lightning.theory.ntk.layers import Layers

# Shares of the largest output: what round-off makes of one sample, alone and among others, and of the same call twice.
_AMONG_OTHERS = {torch.float64: 1e-9, torch.float32: 1e-3}
_AGAIN = {torch.float64: 1e-13, torch.float32: 1e-5}


def a_few(x: Tensor, y: Tensor) -> Tensor:
    """Return a sample of x and up to two that differ from it, around it: copies would not show that they are mixed."""
    others = []
    for z in (x, y) if x is not y else (x,):
        if z.shape[1:] == x.shape[1:] and z.dtype == x.dtype:
            for part in (torch.cat([z[:4], z[-4:]]), z):  # the ends first, because to look at all of them takes time
                rows = (part != x[:1]).reshape(len(part), -1).any(1).nonzero().flatten()
                if len(rows):
                    others += [part[rows[:1]], part[rows[-1:]]][: len(rows)]
                    break
    return torch.cat([*others[:1], x[:1], *others[-1:][: len(others) - 1]])


def try_out(network: Network, layers: Layers, samples: Tensor) -> int:
    """Return the number of outputs of a network that is a function of one sample, and show it to its layers.

    Args:
        network: the network.
        layers: its layers, which look on.
        samples: a few, different ones, (k, …); with one there is nothing to mix.

    Raises:
        ValueError: it is no such function; the error names the layer.

    """
    devices = [network.device] if network.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        state, buffers = _random_state(network.device), network.copied_buffers()
        versions = {name: value._version for name, value in network.values.items()}
        given = network.values | buffers | layers.parameters
        together = _first(network, layers, samples, given)
        if changed := [name for name, value in network.values.items() if value._version != versions[name]]:
            raise UserError(f"the forward pass changes the parameters {changed}: freeze them while it is called")
        if _random_state(network.device) != state:
            raise UserError(f"{_differing(network, samples, samples)} draws random numbers: call eval() first")
        # one in the middle has seen all others, also where what mixes goes from one to the next, either way
        for index in (1,) if len(samples) == 3 else range(len(samples)):
            _check_alone(network, layers, samples, index, together)
        network.changing = [name for name in buffers if given[name] is not buffers[name] or given[name]._version > 0]
        if network.changing and not _agree(network.outputs(samples, given), together, _AGAIN):
            raise UserError(
                f"the forward pass changes the buffers {network.changing}, and its outputs with them: call eval(), or "
                "let them stay as they are"
            )
    return together.shape[1]


def _first(network: Network, layers: Layers, samples: Tensor, values: dict[str, Tensor]) -> Tensor:
    try:
        with torch.enable_grad(), layers.cut_off():
            return network.outputs(samples, values, then=layers.find_other_uses)
    except RuntimeError as error:
        if not any(word in str(error) for word in ("dtype", "scalar type", "Half", "BFloat16")):
            raise
        raise UserError(
            f"{type(network.module).__name__} does not run in {network.dtype}: let it cast nothing by itself, nor hold "
            f"tensors that are neither parameters nor buffers ({reason(error)})"
        ) from error


def _check_alone(network: Network, layers: Layers, samples: Tensor, index: int, together: Tensor) -> None:
    one = samples[index : index + 1]
    with layers.watched_alone(index):
        alone = network(one)
    if _agree(alone, together[index : index + 1], _AMONG_OTHERS):
        return
    if len(samples) == 1 or not _agree(network(one), alone, _AGAIN):
        raise UserError(f"{_differing(network, one, one)} gives another output at each call: take the chance out of it")
    raise UserError(
        f"{_differing(network, samples, one, index)} mixes samples, so that the output for one depends on the others: "
        "a tangent kernel needs a module that takes each sample on its own"
    )


def _differing(network: Network, left: Tensor, right: Tensor, index: int = 0) -> str:
    """Name the first layer that is given the same for the samples index and 0, and returns another output."""
    for (name, *first), (other, *second) in zip(_calls(network, left), _calls(network, right), strict=False):
        pairs = [(a[index : index + 1], b[:1]) for a, b in zip(first, second, strict=True) if a.ndim and b.ndim]
        if name == other and [_agree(*pair, _AMONG_OTHERS) for pair in pairs] == [True, False]:
            return name
    return type(network.module).__name__


def _calls(network: Network, x: Tensor) -> list[tuple[str, Tensor, Tensor]]:
    """Return name, input and output of each layer, in the order in which they end."""
    calls: list[tuple[str, Tensor, Tensor]] = []

    def note(part: nn.Module, given: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) and output else output
        if given and isinstance(given[0], Tensor) and isinstance(output, Tensor):
            name = names[part]
            calls.append((f"{name!r} ({type(part).__name__})" if name else type(part).__name__, given[0], output))

    names = {part: name for name, part in network.module.named_modules()}
    hooks = [part.register_forward_hook(note) for part in names]
    try:
        network(x)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _agree(left: Tensor, right: Tensor, tolerance: Mapping[torch.dtype, float]) -> bool:
    if left.shape != right.shape:
        return False
    share = tolerance[torch.float64 if left.dtype == torch.float64 else torch.float32]
    largest = float(right.abs().nan_to_num(0, 0).max()) if right.numel() else 0.0
    return torch.allclose(left, right, rtol=0, atol=share * largest, equal_nan=True)


def _random_state(device: torch.device) -> bytes:
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    return b"".join(state.numpy().tobytes() for state in states)
