"""Check on a few samples that a network is deterministic and does not mix samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from stepwise_lightning.errors import UserError, reason
from stepwise_lightning.theory.ntk.functional_module import FunctionalModule, layer_label
from stepwise_lightning.theory.ntk.layers import LayerCandidates

# Tolerances for round-off, relative to the largest output: one sample in two batches, and one batch in two calls.
_BATCH_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
_REPEAT_TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}


def select_samples(x: Tensor, y: Tensor) -> Tensor:
    """Return the first sample of x between up to two different ones; identical samples would hide mixing."""
    others: list[Tensor] = []
    for z in (x,) if x is y else (x, y):
        if z.shape[1:] == x.shape[1:] and z.dtype == x.dtype:
            rows = (z != x[:1]).reshape(len(z), -1).any(1).nonzero().flatten()
            others += [z[rows[:1]], z[rows[-1:]]][: len(rows)]
    return torch.cat([*others[:1], x[:1], *others[1:][-1:]])


def check_samples(network: FunctionalModule, candidates: LayerCandidates, samples: Tensor) -> int:
    """Check the network on a few samples, record its candidate layers, and return its number of outputs.

    Refuse a network that draws random numbers, changes its parameters or depends on earlier calls. Mixing of samples is
    checked only for networks with candidates: vmap computes the gradients of all others for single samples. Afterwards,
    ``network.mutable_buffers`` holds the buffers that a forward pass changes.
    """
    devices = [network.device] if network.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        rng_state, buffers = _rng_state(network.device), network.clone_mutable_buffers()
        versions = {name: value._version for name, value in network.state.items()}
        state = network.state | buffers | candidates.parameters
        outputs = _forward_recorded(network, candidates, samples, state)
        if changed := [name for name, value in network.state.items() if value._version != versions[name]]:
            raise UserError(f"the forward pass changes the parameters {changed}: freeze them during the call")
        network.mutable_buffers = [
            name for name in buffers if state[name] is not buffers[name] or state[name]._version > 0
        ]
        tolerance = _REPEAT_TOLERANCE if network.mutable_buffers else _BATCH_TOLERANCE
        repeats = _close(network.forward(samples, state), outputs, tolerance)
        if _rng_state(network.device) != rng_state or not (repeats or network.mutable_buffers):
            raise UserError(f"{_first_difference(network, samples, samples)} draws random numbers: call eval() first")
        if not repeats:
            raise UserError(
                f"the outputs depend on buffers that each call changes, {network.mutable_buffers}: call eval()"
            )
        if candidates.layers:
            _check_independence(network, candidates, samples, outputs)
    return outputs.shape[1]


def _check_independence(
    network: FunctionalModule, candidates: LayerCandidates, samples: Tensor, outputs: Tensor
) -> None:
    # of three samples, the middle one has neighbours on both sides
    for index in (1,) if len(samples) == 3 else range(len(samples)):
        sample = samples[index : index + 1]
        with candidates.record_single_sample(index):
            alone = network(sample)
        if not _close(alone, outputs[index : index + 1], _BATCH_TOLERANCE):
            raise UserError(
                f"{_first_difference(network, samples, sample, index)} mixes samples: a tangent kernel needs a module "
                "whose output for a sample does not depend on the rest of the batch"
            )


def _forward_recorded(
    network: FunctionalModule, candidates: LayerCandidates, samples: Tensor, state: dict[str, Tensor]
) -> Tensor:
    try:
        with torch.enable_grad(), candidates.record_batch(len(samples)):
            return network.forward(samples, state, callback=candidates.find_other_uses)
    except RuntimeError as error:
        if not any(word in str(error) for word in ("dtype", "scalar type", "Half", "BFloat16")):
            raise
        raise UserError(
            f"{type(network.module).__name__} does not run in {network.dtype}: remove its casts and register its "
            f"tensors as parameters or buffers ({reason(error)})"
        ) from error


def _first_difference(network: FunctionalModule, left: Tensor, right: Tensor, index: int = 0) -> str:
    """Name the first layer with equal inputs and different outputs for sample ``index`` of left and 0 of right."""
    calls, other_calls = _record_calls(network, left), _record_calls(network, right)
    for (name, *first), (other, *second) in zip(calls, other_calls, strict=False):
        pairs = [(a[index : index + 1], b[:1]) for a, b in zip(first, second, strict=True) if a.ndim and b.ndim]
        if name == other and [_close(*pair, _BATCH_TOLERANCE) for pair in pairs] == [True, False]:
            return name
    return type(network.module).__name__


def _record_calls(network: FunctionalModule, x: Tensor) -> list[tuple[str, Tensor, Tensor]]:
    """Return name, input and output of each layer, in the order in which they return."""
    calls: list[tuple[str, Tensor, Tensor]] = []

    def record(layer: nn.Module, args: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) and output else output
        if layer in names and args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            calls.append((layer_label(names[layer], layer), args[0], output))

    names = {layer: name for name, layer in network.module.named_modules()}
    with register_module_forward_hook(record):
        network(x)
    return calls


def _close(left: Tensor, right: Tensor, tolerance: Mapping[torch.dtype, float]) -> bool:
    if left.shape != right.shape:
        return False
    relative = tolerance[torch.float64 if left.dtype == torch.float64 else torch.float32]
    largest = float(right.abs().nan_to_num(0, 0).max()) if right.numel() else 0.0
    return torch.allclose(left, right, rtol=0, atol=relative * largest, equal_nan=True)


def _rng_state(device: torch.device) -> bytes:
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    return b"".join(state.numpy().tobytes() for state in states)
