"""A module as a function of its parameters and of one sample, in one precision; what is none is refused."""

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

from stepwise_lightning.errors import UserError, reason
from stepwise_lightning.precision import check_real, on_float64_device

# Shares of the largest output: what round-off makes of one sample, alone and among others, and of the same call twice.
_AMONG_OTHERS = {torch.float64: 1e-9, torch.float32: 1e-3}
_AGAIN = {torch.float64: 1e-13, torch.float32: 1e-5}


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
        return self.outputs(x, self.values | self._copied_buffers() | dict(parameters or {}), then)

    def _copied_buffers(self) -> dict[str, Tensor]:
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

    def try_out(self, samples: Tensor) -> int:
        """Return the number of outputs of a module that is a function of one sample: without chance, memory or mixing.

        Args:
            samples: a few, different ones, (k, …); with one there is nothing to mix.

        Raises:
            ValueError: it is none; the error names the layer.

        """
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            state, buffers = _random_state(self.device), self._copied_buffers()
            versions = {name: value._version for name, value in self.values.items()}
            given = self.values | buffers
            together = self._first(samples, given)
            if changed := [name for name, value in self.values.items() if value._version != versions[name]]:
                raise UserError(f"the forward pass changes the parameters {changed}: freeze them while it is called")
            if _random_state(self.device) != state:
                raise UserError(f"{self._differing(samples, samples)} draws random numbers: call eval() first")
            # the last one too, because the first sees no other where what mixes goes from one to the next
            for index in {0, len(samples) - 1}:
                self._check_alone(samples, index, together)
            self._check_memory(samples, given, buffers, together)
        return together.shape[1]

    def _check_alone(self, samples: Tensor, index: int, together: Tensor) -> None:
        one = samples[index : index + 1]
        alone = self(one)
        if _agree(alone, together[index : index + 1], _AMONG_OTHERS):
            return
        if len(samples) == 1 or not _agree(self(one), alone, _AGAIN):
            raise UserError(f"{self._differing(one, one)} gives another output at each call: take the chance out of it")
        raise UserError(
            f"{self._differing(samples, one, index)} mixes samples, so that the output for one depends on the others: a "
            "tangent kernel needs a module that takes each sample on its own"
        )

    def _first(self, samples: Tensor, values: dict[str, Tensor]) -> Tensor:
        try:
            return self.outputs(samples, values)
        except RuntimeError as error:
            if not any(word in str(error) for word in ("dtype", "scalar type", "Half", "BFloat16")):
                raise
            raise UserError(
                f"{type(self.module).__name__} does not run in {self.dtype}: let it cast nothing by itself, nor hold "
                f"tensors that are neither parameters nor buffers ({reason(error)})"
            ) from error

    def _check_memory(
        self, samples: Tensor, given: dict[str, Tensor], buffers: dict[str, Tensor], outputs: Tensor
    ) -> None:
        """Refuse buffers that a forward pass changes and that change its outputs; ``given`` is what it has left."""
        self.changing = [name for name in buffers if given[name] is not buffers[name] or given[name]._version > 0]
        if self.changing and not _agree(self.outputs(samples, given), outputs, _AGAIN):
            raise UserError(
                f"the forward pass changes the buffers {self.changing}, and its outputs with them: call eval(), or let "
                "them stay as they are"
            )

    def _differing(self, left: Tensor, right: Tensor, index: int = 0) -> str:
        """Name the first layer that is given the same for one sample, at this index and 0, and returns another output."""
        for (name, *first), (other, *second) in zip(self._calls(left), self._calls(right), strict=False):
            pairs = [(a[index : index + 1], b[:1]) for a, b in zip(first, second, strict=True) if a.ndim and b.ndim]
            same = [_agree(*pair, _AMONG_OTHERS) for pair in pairs]
            if name == other and same == [True, False]:
                return name
        return type(self.module).__name__

    def _calls(self, x: Tensor) -> list[tuple[str, Tensor, Tensor]]:
        """Return name, input and output of each layer, in the order in which they end."""
        calls: list[tuple[str, Tensor, Tensor]] = []

        def note(part: nn.Module, given: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) and output else output
            if given and isinstance(given[0], Tensor) and isinstance(output, Tensor):
                name = names[part]
                calls.append((f"{name!r} ({type(part).__name__})" if name else type(part).__name__, given[0], output))

        names = {part: name for name, part in self.module.named_modules()}
        hooks = [part.register_forward_hook(note) for part in names]
        try:
            self(x)
        finally:
            for hook in hooks:
                hook.remove()
        return calls


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


def _agree(left: Tensor, right: Tensor, tolerance: Mapping[torch.dtype, float]) -> bool:
    if left.shape != right.shape:
        return False
    share = tolerance[torch.float64 if left.dtype == torch.float64 else torch.float32]
    largest = float(right.abs().nan_to_num(0, 0).max()) if right.numel() else 0.0
    return torch.allclose(left, right, rtol=0, atol=share * largest, equal_nan=True)


def _random_state(device: torch.device) -> bytes:
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    return b"".join(state.numpy().tobytes() for state in states)
