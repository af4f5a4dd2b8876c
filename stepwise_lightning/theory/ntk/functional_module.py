"""A module as a function of its parameters, in one precision; layers that can be none of one sample are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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


class Network:
    """A module whose parameters and buffers are cast, and which is as it was after each call.

    Args:
        module: what is called.
        dtype: float64 or float32, of floating parameters, buffers and inputs.
        names: the parameters that gradients are taken of.

    Attributes:
        values: parameters and buffers by name, detached; on the CPU where their device has no float64.
        device: where they are.

    Raises:
        ValueError: parameters that are not initialised, or complex; layers that mix samples, draw random numbers or
            change their weights whenever they are called. The error names the layer.

    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, names: Sequence[str]) -> None:
        self.module, self.dtype = module, dtype
        for name, part in module.named_modules():
            _check_layer(f"{name!r} ({type(part).__name__})" if name else type(part).__name__, part)
        for name in names:
            _check_parameter(name, module.get_parameter(name))
        tensors = dict(module.named_parameters()) | dict(module.named_buffers())
        self.values = {name: self.cast(tensor.detach()) for name, tensor in tensors.items()}
        self.device = next(iter(self.values.values())).device
        self.buffers = [name for name, _ in module.named_buffers()]
        self.changing = self.buffers  # until they have been tried out

    def cast(self, tensor: Tensor) -> Tensor:
        """Return a tensor in the precision of this network; integers stay integers."""
        tensor = on_float64_device(tensor)
        if tensor.is_complex():
            return tensor.to(torch.complex128 if self.dtype == torch.float64 else torch.complex64)
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def __call__(
        self, x: Tensor, parameters: Mapping[str, Tensor] | None = None, then: Callable[[Tensor], Any] | None = None
    ) -> Any:
        """Return the outputs for samples (k, …), flattened, (k, d).

        Args:
            x: the samples.
            parameters: stand for those of their name.
            then: called with the outputs while the values are in place, and its result is returned. Gradients are to
                be taken here: checkpointing runs layers again for them.

        """
        return self.outputs(x, self.values | self.copied_buffers() | dict(parameters or {}), then)

    def copied_buffers(self) -> dict[str, Tensor]:
        """Return copies of the buffers that a forward pass changes."""
        return {name: self.values[name].clone() for name in self.changing}

    def outputs(self, x: Tensor, values: dict[str, Tensor], then: Callable[[Tensor], Any] | None = None) -> Any:
        """Return the outputs, (k, d), with the values given, which the forward pass may change."""

        def rows(module: nn.Module) -> Any:
            f = self._rows(module(x), x)
            return then(f) if then else f

        prefixed = {f"module.{name}": value for name, value in values.items()}
        result = functional_call(_Holding(self.module), prefixed, (rows,))
        values.update((name.removeprefix("module."), value) for name, value in prefixed.items())
        return result

    def _rows(self, f: Any, x: Tensor) -> Tensor:
        kind = type(self.module).__name__
        if not isinstance(f, Tensor):
            raise UserError(f"{kind} returns a {type(f).__name__}: wrap it in a module that returns one tensor (k, …)")
        if not f.is_floating_point():
            raise UserError(
                f"{kind} returns {f.dtype}: a tangent kernel needs real outputs with gradients, so wrap it in a module "
                "that returns such (torch.view_as_real splits complex numbers)"
            )
        if len(x) > 1 and (f.ndim == 0 or len(f) != len(x)):
            raise UserError(
                f"{kind} returns shape {tuple(f.shape)} for {len(x)} samples: its outputs must have one row a sample"
            )
        return f.reshape(len(x), -1)

    def inputs(self, x: Tensor, name: str) -> Tensor:
        """Return samples as the module takes them: integers as they are if it does, all else in its precision."""
        check_real(x, name)
        if x.ndim < 1 or x.numel() == 0:
            raise UserError(f"{name} must hold samples (k, …), k ≥ 1, got shape {tuple(x.shape)}")
        x = on_float64_device(x.detach()).to(self.device)
        x = x.clone() if x.is_inference() else x
        if x.is_floating_point():
            return x.to(self.dtype)
        try:
            with torch.no_grad():
                self(x[:1])
        except UserError:
            raise
        except Exception:  # whatever layers say that multiply with what they get
            return x.to(self.dtype)
        return x


class _Holding(nn.Module):
    """Gives a module to a function, so that it runs, and more, while functional_call has values in place."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, call: Callable[[nn.Module], Any]) -> Any:
        return call(self.module)


@contextmanager
def left_alone(module: nn.Module) -> Iterator[None]:
    """Give each layer its attributes, parameters and buffers back.

    Some layers keep what they have computed, such as the old weight_norm, and functional_call leaves its own values in
    a layer that stands in two places.
    """
    before = [(held, dict(held)) for part in module.modules() for held in (part._parameters, part._buffers, vars(part))]
    try:
        yield
    finally:
        for held, values in before:
            held.clear()
            held.update(values)


def _check_layer(label: str, part: nn.Module) -> None:
    if isinstance(part, torch.jit.ScriptModule):
        raise UserError(f"{label} is compiled by torch.jit: give the module that it was made of")
    if isinstance(part, (_BatchNorm, _DropoutNd)) and part.training:
        raise UserError(
            f"{label} is in training mode, where samples depend on each other or on chance: call eval() on the module "
            "first"
        )
    if isinstance(part, _BatchNorm) and part.running_mean is None:
        raise UserError(
            f"{label} has no running statistics and mixes samples also after eval(): build it with "
            "track_running_stats=True, or take a GroupNorm or LayerNorm"
        )
    if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.max_norm is not None:
        raise UserError(f"{label} has max_norm, and rescales its weights whenever it is called: set it to None")
    for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
        if is_lazy(tensor):
            raise UserError(f"{label} has a {name} that is not initialised yet: call the module once on a batch first")
        if tensor.device.type == "meta":
            raise UserError(f"{label} has a {name} on the device 'meta', without values: load its weights first")


def _check_parameter(name: str, parameter: Tensor) -> None:
    if not parameter.is_floating_point():
        raise UserError(
            f"the parameter {name!r} is {parameter.dtype}, and a tangent kernel needs real ones: hold real and "
            "imaginary part as two, or leave it out by naming the others in parameters"
        )
