r"""Tangent kernel of a finite network, in bounded memory.

Source: Jacot, Gabriel, Hongler, *Neural Tangent Kernel*, NeurIPS 2018, arXiv 1806.07572.

Legend
    f_o(x)      output o of d, embedding dimension
    J_o(x)      gradient of f_o(x) with respect to the parameters, (p,)
    a, δ_o      input of a linear layer, and gradient of f_o with respect to its output
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from stepwise_lightning.errors import UserError
from stepwise_lightning.precision import TensorLike, as_tensor, without_autocast, without_tf32
from stepwise_lightning.theory.estimator import Estimator
from stepwise_lightning.theory.ntk.functional_module import FunctionalModule, preserve_attributes
from stepwise_lightning.theory.ntk.layer_blocks import add_blocks, layerwise_kernel, min_numbers
from stepwise_lightning.theory.ntk.layer_kernels import inner_products
from stepwise_lightning.theory.ntk.layers import LayerCandidates, LayerSizes, NotLayerwiseError
from stepwise_lightning.theory.ntk.sample_checks import check_samples, select_samples
from stepwise_lightning.theory.process_group import process_group
from stepwise_lightning.theory.progress import progress_bar

# Copies of the gradients that vmap holds at once.
_COPIES = 4


class EmpiricalNTK(Estimator):
    r"""Tangent kernel K(x, y) = (1/d) Σ_o ⟨J_o(x), J_o(y)⟩ of a module at its current parameters.

    Call it like a kernel function, or pass it to :class:`ContrastiveKernelPCA`. The Jacobian is never stored. Linear
    layers, convolutions and normalisations that run once are computed layer by layer, from their inputs and output
    gradients, with one backward pass per output: a linear layer on vectors has J_o = δ_o aᵀ and adds the kernel
    (Σ_o δ_o(x)·δ_o(y)) (a(x)·a(y)), with + 1 in the second factor for its bias. Gradients of all other parameters,
    shared weights included, are computed per sample with ``vmap``, one output at a time. If y is x, half is computed.

    Each call first runs up to three samples to check that the module is deterministic and, for the layer-wise route,
    that it does not mix samples. The module is unchanged afterwards. Long calls show their progress on standard error.
    Supported networks: ``docs/inputs.md``.

    Args:
        module: from (k, …) to one tensor (k, …), which is flattened; each sample is independent of the others, and
            batch normalisation and dropout are in evaluation mode.
        parameters: ``"all"`` (frozen ones included), ``"last"`` (the last linear layer), or names of parameters.
        max_bytes: memory for gradients.
        dtype: precision, for modules of any dtype: float64, or float32 with half the memory and six digits.

    Example:
        The tangent kernel of a linear map without a bias is the linear kernel:

        >>> import torch
        >>> from torch import nn
        >>> from stepwise_lightning.theory import EmpiricalNTK
        >>> x = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
        >>> EmpiricalNTK(nn.Linear(2, 3, bias=False))(x, x)
        tensor([[5., 2.],
                [2., 1.]], dtype=torch.float64)

    Raises:
        ValueError: unknown parameters or ``dtype``. In a call: the module mixes samples, draws random numbers, is
            uninitialised, is complex, or does not return a row of real numbers for each sample; or ``max_bytes`` is too
            small for one pair of samples (the error gives the minimum).

    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Literal["all", "last"] | Sequence[str] = "all",
        max_bytes: int = 2**30,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise UserError(f"module must be a torch.nn.Module, got {type(module).__name__}: pass the network")
        if dtype not in (torch.float32, torch.float64):
            raise UserError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        self.module, self.max_bytes, self.dtype = module, max_bytes, dtype
        self.parameters = parameters
        _parameter_names(module, parameters)

    def __repr__(self) -> str:
        names = self.parameters if isinstance(self.parameters, str) else f"{len(self.parameters)} named"
        return f"EmpiricalNTK({type(self.module).__name__}, parameters={names})"

    def __call__(self, x: TensorLike, y: TensorLike) -> Tensor:
        """Return the kernel of (k, …) and (l, …) inputs, tensors or arrays, (k, l), float64.

        The result is on the device of the module, or on the CPU if that device has no float64. Floating-point inputs
        are cast; integers, such as tokens, are cast only if the module does not run on them.

        Once ``torch.distributed`` is initialised, the ranks divide the rows: all ranks call with the same inputs and
        parameters and get the whole kernel. Wrap a call of one rank in ``with one_process():``
        (:mod:`stepwise_lightning.theory.process_group`).
        """
        left = as_tensor(x, "x")
        right = left if x is y else as_tensor(y, "y")
        group = process_group()
        group.check_same_call("EmpiricalNTK", left, right, *self.module.parameters())
        if left is right:
            return group.symmetric_kernel(self._compute, left)
        return group.map_rows(lambda rows: self._compute(rows, right), left)

    def _compute(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.inference_mode(False), ExitStack() as stack:
            network = FunctionalModule(self.module, self.dtype, _parameter_names(self.module, self.parameters))
            stack.enter_context(preserve_attributes(self.module))
            stack.enter_context(without_autocast(network.device))
            stack.enter_context(without_tf32())
            left = network.prepare_inputs(x, "x")
            right = left if x is y else network.prepare_inputs(y, "y")
            samples, candidates = select_samples(left, right), LayerCandidates(network)
            num_outputs = check_samples(network, candidates, samples)
            layers = candidates.layerwise()
            # identical samples cannot show mixing, and run one at a time
            max_batch = 1 if len(samples) == 1 else max(len(left), len(right))
            try:
                return self._kernel(network, layers, left, right, num_outputs, max_batch)
            except NotLayerwiseError:
                return self._kernel(network, {}, left, right, num_outputs, max_batch)

    def _kernel(
        self, network: FunctionalModule, layers: LayerSizes, x: Tensor, y: Tensor, num_outputs: int, max_batch: int
    ) -> Tensor:
        others = [name for name in network.names if name.rpartition(".")[0] not in layers]
        numbers = _COPIES * sum(network.state[name].numel() for name in others)
        bytes_per_number = 2 * self.dtype.itemsize  # both sides of the kernel
        if (minimum := max(numbers, min_numbers(layers)) * bytes_per_number) > self.max_bytes:
            raise UserError(f"max_bytes {self.max_bytes} cannot hold the gradients of a pair: use at least {minimum}")
        kernel = torch.zeros(len(x), len(y), dtype=torch.float64, device=network.device)
        if layers:
            kernel += layerwise_kernel(network, layers, x, y, num_outputs, max_batch, self.max_bytes)
        if others:
            rows = self.max_bytes // (bytes_per_number * max(numbers, 1))
            gradients, per_sample = _PerSampleGradients(network, others), torch.zeros_like(kernel)
            for output in progress_bar("tangent kernel", "output", items=range(num_outputs)):
                add_blocks(per_sample, x, y, rows, partial(gradients, output), inner_products)
            kernel += per_sample
        return kernel / num_outputs


class _PerSampleGradients:
    """Gradients of one output for each sample, (k, p), with vmap if the module supports it."""

    def __init__(self, network: FunctionalModule, names: list[str]) -> None:
        self.network, self.names, self.use_vmap = network, names, True

    def __call__(self, output: int, x: Tensor) -> Tensor:
        """Return the gradients at samples (k, …)."""
        if self.use_vmap:
            try:
                return self._vectorized(x, output)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # vmap raises various errors for in-place changes, data-dependent branches, some layers
                self.use_vmap = False
        return torch.stack([self._single(sample[None], output) for sample in x])

    def _vectorized(self, x: Tensor, output: int) -> Tensor:
        def evaluate(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
            return self.network(sample[None], parameters)[0, output]

        gradients = vmap(grad(evaluate), in_dims=(None, 0))({name: self.network.state[name] for name in self.names}, x)
        return torch.cat([gradients[name].reshape(len(x), -1) for name in self.names], 1)

    def _single(self, x: Tensor, output: int) -> Tensor:
        parameters = {name: self.network.state[name].detach().requires_grad_() for name in self.names}

        def backward(outputs: Tensor) -> Tensor:
            if not outputs.requires_grad:
                return torch.zeros(sum(p.numel() for p in parameters.values())).to(outputs)
            gradients = torch.autograd.grad(outputs[0, output], list(parameters.values()), materialize_grads=True)
            return torch.cat([(g.to_dense() if g.is_sparse else g).flatten() for g in gradients])

        with torch.enable_grad():
            return self.network(x, parameters, callback=backward)


def _parameter_names(module: nn.Module, parameters: str | Sequence[str]) -> list[str]:
    names = [name for name, _ in module.named_parameters()]
    if parameters == "all":
        selected = names
    elif parameters == "last":
        layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
        # compare identities, because tied weights can have the name of another layer
        last = {id(p) for p in layers[-1].parameters()} if layers else set()
        selected = [name for name, p in module.named_parameters() if id(p) in last]
    else:
        selected = list(dict.fromkeys([parameters] if isinstance(parameters, str) else parameters))
    if unknown := sorted(set(selected) - set(names)):
        raise UserError(f"unknown parameters {unknown}: use 'all', 'last' or names among {', '.join(names[:20])}")
    if not selected:
        raise UserError(f"{type(module).__name__} has no {'linear layer' if parameters == 'last' else 'parameters'}")
    return selected
