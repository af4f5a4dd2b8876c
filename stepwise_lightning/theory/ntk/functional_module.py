"""A module as a function of its parameters in one precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy

from stepwise_lightning.errors import UserError
from stepwise_lightning.precision import check_real, on_float64_device


class FunctionalModule:
    """A module that is called with cast copies of its parameters and buffers and keeps its own unchanged.

    ``dtype``, float64 or float32, is the type of floating-point parameters, buffers and inputs; ``names`` are the
    parameters to differentiate by. ``state`` holds detached parameters and buffers by name, on the CPU if their device
    has no float64, and ``mutable_buffers`` the names of the buffers that a forward pass may change.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, names: list[str]) -> None:
        self.module, self.dtype, self.names = module, dtype, names
        for name, layer in module.named_modules():
            _check_layer(layer_label(name, layer), layer)
        for name in names:
            if not module.get_parameter(name).is_floating_point():
                raise UserError(
                    f"parameter {name!r} is {module.get_parameter(name).dtype}: store real and imaginary parts as two "
                    "parameters, or list the real parameters in `parameters`"
                )
        tensors = dict(module.named_parameters()) | dict(module.named_buffers())
        self.state = {name: self._cast(tensor.detach()) for name, tensor in tensors.items()}
        self.device = next(iter(self.state.values())).device
        self.mutable_buffers = [name for name, _ in module.named_buffers()]

    def _cast(self, tensor: Tensor) -> Tensor:
        tensor = on_float64_device(tensor)
        if tensor.is_complex():
            return tensor.to(torch.complex128 if self.dtype == torch.float64 else torch.complex64)
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def __call__(
        self, x: Tensor, parameters: Mapping[str, Tensor] | None = None, callback: Callable[[Tensor], Any] | None = None
    ) -> Any:
        """Return the flattened outputs, (k, d), for samples (k, …), or the result of ``callback(outputs)``.

        ``parameters`` replace others by name. Compute gradients in the callback: activation checkpointing runs layers
        again in the backward pass, with the tensors that the module then holds.
        """
        return self.forward(x, self.state | self.clone_mutable_buffers() | dict(parameters or {}), callback)

    def clone_mutable_buffers(self) -> dict[str, Tensor]:
        """Return copies of the buffers that a forward pass may change."""
        return {name: self.state[name].clone() for name in self.mutable_buffers}

    def forward(self, x: Tensor, state: dict[str, Tensor], callback: Callable[[Tensor], Any] | None = None) -> Any:
        """Return the outputs, (k, d), for a given state, which the forward pass may change."""

        def run(module: nn.Module) -> Any:
            outputs = self._flatten_outputs(module(x), x)
            return callback(outputs) if callback else outputs

        prefixed = {f"module.{name}": value for name, value in state.items()}
        result = functional_call(_Caller(self.module), prefixed, (run,))
        state.update((name.removeprefix("module."), value) for name, value in prefixed.items())
        return result

    def _flatten_outputs(self, outputs: Any, x: Tensor) -> Tensor:
        is_tensor = isinstance(outputs, Tensor)
        has_rows = is_tensor and (len(x) == 1 or (outputs.ndim > 0 and len(outputs) == len(x)))
        if not (has_rows and outputs.is_floating_point()):
            kind = f"{outputs.dtype} of shape {tuple(outputs.shape)}" if is_tensor else type(outputs).__name__
            raise UserError(
                f"{type(self.module).__name__} returns {kind} for {len(x)} samples: wrap it in a module that "
                "returns one real tensor with a row for each sample (torch.view_as_real splits complex numbers)"
            )
        return outputs.reshape(len(x), -1)

    def prepare_inputs(self, x: Tensor, name: str) -> Tensor:
        """Return samples on the device and in the precision of the module; integers are kept if the module runs."""
        check_real(x, name)
        if x.ndim < 1 or x.numel() == 0:
            raise UserError(f"{name} must contain at least one sample, shape (k, …), got shape {tuple(x.shape)}")
        x = on_float64_device(x.detach()).to(self.device)
        x = x.clone() if x.is_inference() else x
        if x.is_floating_point():
            return x.to(self.dtype)
        try:
            with torch.no_grad():
                self(x[:1])
        except UserError:
            raise
        except Exception:  # layers that cannot multiply integers raise various errors
            return x.to(self.dtype)
        return x


class _Caller(nn.Module):
    """Passes its submodule to a function, which can then run more than a forward pass inside functional_call."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[[nn.Module], Any]) -> Any:
        return function(self.module)


@contextmanager
def preserve_attributes(module: nn.Module) -> Iterator[None]:
    """Restore the attributes, parameters and buffers of each layer on exit.

    Some layers store computed weights, such as the old weight_norm, and functional_call does not restore a layer that
    is registered under two names.
    """
    saved = [(d, dict(d)) for layer in module.modules() for d in (layer._parameters, layer._buffers, vars(layer))]
    try:
        yield
    finally:
        for attributes, values in saved:
            attributes.clear()
            attributes.update(values)


def layer_label(name: str, layer: nn.Module) -> str:
    """Return the name of a layer for error messages."""
    return f"{name!r} ({type(layer).__name__})" if name else type(layer).__name__


def _check_layer(label: str, layer: nn.Module) -> None:
    if isinstance(layer, torch.jit.ScriptModule):
        raise UserError(f"{label} is compiled by torch.jit: pass the original module")
    if isinstance(layer, (_BatchNorm, _DropoutNd)) and layer.training:
        raise UserError(
            f"{label} is in training mode and mixes samples or draws random numbers: call eval() on the module first"
        )
    if isinstance(layer, _BatchNorm) and layer.running_mean is None:
        raise UserError(
            f"{label} has no running statistics and mixes samples in evaluation mode too: use "
            "track_running_stats=True, GroupNorm or LayerNorm"
        )
    if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and layer.max_norm is not None:
        raise UserError(f"{label} has max_norm and rescales its weights in each forward pass: set max_norm to None")
    for name, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
        if is_lazy(tensor):
            raise UserError(f"{label} has an uninitialised {name}: call the module on a batch first")
        if tensor.device.type == "meta":
            raise UserError(f"{label} has a {name} without values, on the device 'meta': load its weights first")
