r"""The neural tangent kernel of an actual network, in bounded memory.

Source: Jacot, Gabriel, Hongler, *Neural Tangent Kernel*, NeurIPS 2018, arXiv 1806.07572.

Legend
    f_o(x)      output o of d, embedding dimension
    J_o(x)      gradient of f_o(x) with respect to the parameters, (p,)
    a, δ_o      a linear layer's input, and the gradient of f_o with respect to its output
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from stepwise_lightning.errors import UserError

# vmap keeps a few copies of what it differentiates.
_COPIES = 4


class EmpiricalNTK:
    r"""The tangent kernel K(x, y) = (1/d) Σ_o ⟨J_o(x), J_o(y)⟩ of a module's current parameters.

    It is called as a kernel, so that :class:`ContrastiveKernelPCA` takes it, and sees the parameters as they are at
    each call. The Jacobian is never held. A linear layer on vectors has J_o = δ_o aᵀ, so that its share of the kernel
    is (Σ_o δ_o(x)·δ_o(y)) (a(x)·a(y)) (+ 1 in the second factor for its bias), from one pass backwards per output. The
    gradients of all other parameters are taken per sample, for as many samples as fit, one output at a time.

    Args:
        module: from (k, …) to (k, …), each sample on its own: batch normalisation and dropout must be in evaluation
            mode. Its outputs are flattened.
        parameters: ``"all"``, ``"last"`` for those of the last linear layer, or names of parameters.
        max_bytes: memory for gradients.
        dtype: float64, or float32 for half the memory and six digits.

    Raises:
        ValueError: unknown parameters, or another ``dtype``; when called, batch normalisation or dropout in training
            mode, or ``max_bytes`` too small for one pair of samples (the error says what is enough).

    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Literal["all", "last"] | Sequence[str] = "all",
        max_bytes: int = 2**30,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise UserError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        self.module, self.max_bytes, self.dtype = module, max_bytes, dtype
        self.names = _chosen(module, parameters)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the kernel of (k, …) and (l, …) inputs, (k, l), float64, on the device of the module."""
        for name, part in self.module.named_modules():
            if isinstance(part, (_BatchNorm, _DropoutNd)) and part.training:
                raise UserError(
                    f"{name!r} ({type(part).__name__}) is in training mode, where samples depend on each other or on "
                    "chance: call eval() on the module first"
                )
        values = self._cast(dict(self.module.named_parameters()) | dict(self.module.named_buffers()))
        device = next(iter(values.values())).device
        same = x is y
        x, y = (z.to(device, self.dtype) for z in (x, y))
        layers = self._linear_layers(values, x[:1])
        with_layers = {f"{name}.{kind}" for name in layers for kind in ("weight", "bias")}
        rest = [name for name in self.names if name not in with_layers]
        outputs = self._outputs(values, x)
        widths = [values[f"{name}.weight"].shape for name in layers]
        numbers = (
            sum(outputs * wide + narrow for wide, narrow in widths),
            _COPIES * sum(values[n].numel() for n in rest),
        )
        rows = [self._rows(needed, max(numbers)) for needed in numbers]
        kernel = torch.zeros(len(x), len(y), dtype=torch.float64, device=device)
        if layers:
            kernel += self._layerwise(values, layers, x, y, rows[0])
        if rest:
            kernel += self._per_sample(values, rest, x, x if same else y, rows[1])
        return kernel / outputs

    def _cast(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: v.detach().to(self.dtype) if v.is_floating_point() else v for n, v in values.items()}

    def _linear_layers(self, values: dict[str, Tensor], x: Tensor) -> list[str]:
        """Return the linear layers among the chosen that run once, on vectors, and share their weights with none."""
        layers = {name: part for name, part in self.module.named_modules() if type(part) is nn.Linear}
        owners = Counter(id(p) for part in self.module.modules() for p in part.parameters(recurse=False))
        calls: Counter[str] = Counter()

        def note(_module: nn.Module, inputs: Any, _output: Tensor, name: str) -> None:
            calls[name] += 1 if inputs[0].ndim == 2 else 2

        hooks = [part.register_forward_hook(partial(note, name=name)) for name, part in layers.items()]
        try:
            with torch.no_grad():
                functional_call(self.module, values, (x,))
        finally:
            for hook in hooks:
                hook.remove()
        return [
            name
            for name, part in layers.items()
            if calls[name] == 1
            and any(f"{name}.{kind}" in self.names for kind in ("weight", "bias"))
            and all(owners[id(p)] == 1 for p in part.parameters(recurse=False))
        ]

    def _layerwise(self, values: dict[str, Tensor], layers: list[str], x: Tensor, y: Tensor, rows: int) -> Tensor:
        def blocks(z: Tensor) -> Iterator[list[tuple[Tensor, Tensor]]]:
            return (self._linear_parts(values, layers, part) for part in z.split(rows))

        return torch.cat([torch.cat([self._contract(layers, a, b) for b in blocks(y)], 1) for a in blocks(x)])

    def _linear_parts(self, values: dict[str, Tensor], layers: list[str], x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return each layer's input, (k, in), and all outputs' gradients with respect to its output, (k, d·out)."""
        inputs: dict[str, Tensor] = {}
        taps: dict[str, Tensor] = {}

        def tap(_module: nn.Module, given: Any, output: Tensor, name: str) -> Tensor:
            inputs[name], taps[name] = given[0].detach(), torch.zeros_like(output, requires_grad=True)
            return output + taps[name]

        hooks = [self.module.get_submodule(name).register_forward_hook(partial(tap, name=name)) for name in layers]
        try:
            with torch.enable_grad():
                f = functional_call(self.module, values, (x,)).flatten(1)
                sums = f.sum(0)  # samples do not mix, so that the gradient of a sum holds each sample's own
                deltas = [
                    torch.autograd.grad(out, [taps[n] for n in layers], retain_graph=True, materialize_grads=True)
                    for out in sums
                ]
        finally:
            for hook in hooks:
                hook.remove()
        return [(inputs[name], torch.cat([d[i] for d in deltas], 1)) for i, name in enumerate(layers)]

    def _contract(self, layers: list[str], a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> Tensor:
        total: Tensor | int = 0
        for name, (inputs_a, deltas_a), (inputs_b, deltas_b) in zip(layers, a, b, strict=True):
            product = (inputs_a @ inputs_b.T).double() if f"{name}.weight" in self.names else 0.0
            product = product + (1.0 if f"{name}.bias" in self.names else 0.0)
            total = total + (deltas_a @ deltas_b.T).double() * product
        assert isinstance(total, Tensor)
        return total

    def _per_sample(self, values: dict[str, Tensor], names: list[str], x: Tensor, y: Tensor, rows: int) -> Tensor:
        kernel = torch.zeros(len(x), len(y), dtype=torch.float64, device=x.device)
        for o in range(self._outputs(values, x)):
            for i in range(0, len(x), rows):
                left = self._gradients(values, names, x[i : i + rows], o)
                for j in range(i if x is y else 0, len(y), rows):
                    right = left if x is y and i == j else self._gradients(values, names, y[j : j + rows], o)
                    block = (left @ right.T).double()
                    kernel[i : i + rows, j : j + rows] += block
                    if x is y and i != j:
                        kernel[j : j + rows, i : i + rows] += block.T
        return kernel

    def _gradients(self, values: dict[str, Tensor], names: list[str], x: Tensor, output: int) -> Tensor:
        """Return the gradients of one output with respect to the named parameters, (k, p)."""
        fixed = {name: value for name, value in values.items() if name not in names}

        def one(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
            return functional_call(self.module, fixed | parameters, (sample[None],)).flatten()[output]

        gradients = vmap(grad(one), in_dims=(None, 0))({name: values[name] for name in names}, x)
        return torch.cat([gradients[name].flatten(1) for name in names], 1)

    def _outputs(self, values: dict[str, Tensor], x: Tensor) -> int:
        with torch.no_grad():
            return functional_call(self.module, values, (x[:1],)).numel()

    def _rows(self, numbers: int, most: int) -> int:
        """Return how many samples' gradients, so many numbers each, may be held twice, for both sides of the kernel."""
        a_number = 2 * self.dtype.itemsize
        if most * a_number > self.max_bytes:
            raise UserError(
                f"max_bytes {self.max_bytes} cannot hold the gradients of a pair: at least {most * a_number}"
            )
        return self.max_bytes // (a_number * max(numbers, 1))


def _chosen(module: nn.Module, parameters: str | Sequence[str]) -> list[str]:
    names = [name for name, _ in module.named_parameters()]
    if parameters == "all":
        chosen = names
    elif parameters == "last":
        layers = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
        prefix = f"{layers[-1]}." if layers and layers[-1] else ""
        chosen = [name for name in names if layers and name in (f"{prefix}weight", f"{prefix}bias")]
    else:
        chosen = [parameters] if isinstance(parameters, str) else list(parameters)
    if unknown := sorted(set(chosen) - set(names)):
        raise UserError(f"no parameters {unknown}; give 'all', 'last', or names among {', '.join(names[:20])}")
    if not chosen:
        raise UserError(f"{type(module).__name__} has no {'linear layer' if parameters == 'last' else 'parameters'}")
    return chosen
