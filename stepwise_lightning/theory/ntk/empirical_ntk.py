r"""The neural tangent kernel of an actual network, in bounded memory.

Source: Jacot, Gabriel, Hongler, *Neural Tangent Kernel*, NeurIPS 2018, arXiv 1806.07572.

Legend
    f_o(x)      output o of d, embedding dimension
    J_o(x)      gradient of f_o(x) with respect to the parameters, (p,)
    a, δ_o      a linear layer's input, and the gradient of f_o with respect to its output
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from stepwise_lightning.errors import UserError
from stepwise_lightning.precision import without_autocast
from stepwise_lightning.theory.estimator import Estimator
from stepwise_lightning.theory.ntk.functional_module import Network, left_alone
from stepwise_lightning.theory.ntk.layer_blocks import layerwise, least_numbers
from stepwise_lightning.theory.ntk.layer_kernels import product
from stepwise_lightning.theory.ntk.layers import Layers, NotLayerwiseError, Sizes
from stepwise_lightning.theory.ntk.sample_checks import a_few, try_out
from stepwise_lightning.theory.process_group import process_group

# vmap keeps a few copies of what it differentiates.
_COPIES = 4


class EmpiricalNTK(Estimator):
    r"""The tangent kernel K(x, y) = (1/d) Σ_o ⟨J_o(x), J_o(y)⟩ of a module's current parameters.

    It is called as a kernel, so that :class:`ContrastiveKernelPCA` takes it, and sees the parameters as they are at
    each call. The Jacobian is never held. Linear layers, convolutions and normalisations that run once are taken one by
    one, from what they are given and the gradients of their output, with one pass backwards per output for all of them:
    a linear layer on vectors has J_o = δ_o aᵀ, so that its share of the kernel is (Σ_o δ_o(x)·δ_o(y)) (a(x)·a(y)) (+ 1
    in the second factor for its bias). The gradients of all other parameters, also of weights that are used twice, are
    taken per sample, for as many samples as fit, one output at a time. Where y is x, half of it is computed.

    At each call a few samples are tried out, alone and together, and what is no function of one sample is refused. The
    module is as it was afterwards. What becomes of which network: ``docs/inputs.md``.

    Args:
        module: from (k, …) to (k, …), one tensor, each sample on its own: batch normalisation and dropout must be in
            evaluation mode. Its outputs are flattened.
        parameters: ``"all"``, frozen ones included, ``"last"`` for those of the last linear layer, or names of
            parameters.
        max_bytes: memory for gradients.
        dtype: float64, or float32 for half the memory and six digits; whatever the type of the module.

    Example:
        Of a linear map without a bias the tangent kernel is the linear kernel:

        >>> import torch
        >>> from torch import nn
        >>> from stepwise_lightning.theory import EmpiricalNTK
        >>> x = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
        >>> EmpiricalNTK(nn.Linear(2, 3, bias=False))(x, x)
        tensor([[5., 2.],
                [2., 1.]], dtype=torch.float64)

    Raises:
        ValueError: unknown parameters, or another ``dtype``; when called, a module that mixes samples, draws random
            numbers, is not initialised, is complex, or returns something else than a row of real numbers a sample, or
            ``max_bytes`` too small for one pair of samples (the error says what is enough).

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
        self.parameters = parameters
        _chosen(module, parameters)

    def __repr__(self) -> str:
        chosen = self.parameters if isinstance(self.parameters, str) else f"{len(self.parameters)} named"
        return f"EmpiricalNTK({type(self.module).__name__}, parameters={chosen})"

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the kernel of (k, …) and (l, …) inputs, (k, l), float64.

        It is computed on the device of the module, or on the CPU where that has no float64. Floating inputs are cast;
        integers are given to the module as they are if it takes them (such as token numbers), else cast.

        Once ``torch.distributed`` is initialised, the ranks share the rows: all call it together, with the same inputs
        and parameters, and each gets the whole. What one rank calls alone stands in ``with one_process():``
        (:mod:`stepwise_lightning.theory.process_group`).
        """
        group = process_group()
        group.check_same_call("EmpiricalNTK", x, y, *self.module.parameters())
        if x is y:
            return group.symmetric_kernel(self._alone, x)
        return group.map_rows(lambda rows: self._alone(rows, y), x)

    def _alone(self, x: Tensor, y: Tensor) -> Tensor:
        names = _chosen(self.module, self.parameters)
        with torch.inference_mode(False), ExitStack() as stack:
            network = Network(self.module, self.dtype, names)
            stack.enter_context(left_alone(self.module))
            stack.enter_context(without_autocast(network.device))
            left = network.inputs(x, "x")
            right = left if x is y else network.inputs(y, "y")
            samples, looked_at = a_few(left, right), Layers(network, names)
            outputs = try_out(network, looked_at, samples)
            layers = looked_at.usable(len(samples))
            # copies of one sample have not shown whether they are mixed, and are taken one by one
            most = 1 if len(samples) == 1 else max(len(left), len(right))
            try:
                return self._kernel(network, names, layers, left, right, outputs, most)
            except NotLayerwiseError:
                return self._kernel(network, names, {}, left, right, outputs, most)

    def _kernel(
        self, network: Network, names: list[str], layers: Sizes, x: Tensor, y: Tensor, outputs: int, most: int
    ) -> Tensor:
        with_layers = {f"{name}.{kind}" for name in layers for kind in ("weight", "bias")}
        rest = [name for name in names if name not in with_layers]
        numbers = _COPIES * sum(network.values[name].numel() for name in rest)
        rows = self._rows(numbers, max(numbers, least_numbers(layers)))
        kernel = torch.zeros(len(x), len(y), dtype=torch.float64, device=network.device)
        if layers:
            kernel += layerwise(network, names, layers, x, y, outputs, most, self.max_bytes)
        if rest:
            kernel += _per_sample(network, rest, x, y, outputs, rows)
        return kernel / outputs

    def _rows(self, numbers: int, most: int) -> int:
        """Return how many samples' gradients, so many numbers each, may be held twice, for both sides of the kernel."""
        a_number = 2 * self.dtype.itemsize
        if most * a_number > self.max_bytes:
            raise UserError(
                f"max_bytes {self.max_bytes} cannot hold the gradients of a pair: at least {most * a_number}"
            )
        return self.max_bytes // (a_number * max(numbers, 1))


def _per_sample(network: Network, names: list[str], x: Tensor, y: Tensor, outputs: int, rows: int) -> Tensor:
    gradients = _Gradients(network, names)
    kernel = torch.zeros(len(x), len(y), dtype=torch.float64, device=x.device)
    for o in range(outputs):
        for i in range(0, len(x), rows):
            left = gradients(x[i : i + rows], o)
            for j in range(i if x is y else 0, len(y), rows):
                right = left if x is y and i == j else gradients(y[j : j + rows], o)
                block = product(left, right)
                kernel[i : i + rows, j : j + rows] += block
                if x is y and i != j:
                    kernel[j : j + rows, i : i + rows] += block.T
    return kernel


class _Gradients:
    """Gradients of one output with respect to parameters, (k, p), of all samples at once if the module lets it."""

    def __init__(self, network: Network, names: list[str]) -> None:
        self.network, self.names, self.at_once = network, names, True

    def __call__(self, x: Tensor, output: int) -> Tensor:
        """Return the gradients at samples (k, …)."""
        if self.at_once:
            try:
                return self._vectorised(x, output)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # vmap refuses in-place changes, branches on values and some layers, each in its own way
                self.at_once = False
        return torch.stack([self._of_one(sample[None], output) for sample in x])

    def _vectorised(self, x: Tensor, output: int) -> Tensor:
        def one(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
            return self.network(sample[None], parameters)[0, output]

        gradients = vmap(grad(one), in_dims=(None, 0))({name: self.network.values[name] for name in self.names}, x)
        return torch.cat([gradients[name].reshape(len(x), -1) for name in self.names], 1)

    def _of_one(self, x: Tensor, output: int) -> Tensor:
        parameters = {name: self.network.values[name].detach().requires_grad_() for name in self.names}

        def backwards(f: Tensor) -> Tensor:
            if not f.requires_grad:
                return torch.zeros(sum(p.numel() for p in parameters.values())).to(f)
            gradients = torch.autograd.grad(f[0, output], list(parameters.values()), materialize_grads=True)
            return torch.cat([(g.to_dense() if g.is_sparse else g).flatten() for g in gradients])

        with torch.enable_grad():
            return self.network(x, parameters, then=backwards)


def _chosen(module: nn.Module, parameters: str | Sequence[str]) -> list[str]:
    names = [name for name, _ in module.named_parameters()]
    if parameters == "all":
        chosen = names
    elif parameters == "last":
        layers = [part for part in module.modules() if isinstance(part, nn.Linear)]
        # by identity: weights may be tied to another layer's, and have that one's name
        of_last = {id(p) for p in layers[-1].parameters()} if layers else set()
        chosen = [name for name, p in module.named_parameters() if id(p) in of_last]
    else:
        chosen = list(dict.fromkeys([parameters] if isinstance(parameters, str) else parameters))
    if unknown := sorted(set(chosen) - set(names)):
        raise UserError(f"no parameters {unknown}; give 'all', 'last', or names among {', '.join(names[:20])}")
    if not chosen:
        raise UserError(f"{type(module).__name__} has no {'linear layer' if parameters == 'last' else 'parameters'}")
    return chosen
