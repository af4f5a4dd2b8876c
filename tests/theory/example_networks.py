"""Small networks and inputs from fixed seeds, and their explicit tangent kernels."""

import copy
import warnings

import torch
from torch import Tensor, nn


def custom(forward, **members: nn.Module | nn.Parameter | Tensor) -> nn.Module:
    """Return a module with these layers, parameters or buffers and ``forward(self, x)``."""

    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in members.items():
                if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                    self.register_buffer(name, value)
                else:
                    setattr(self, name, value)

        def forward(self, x: Tensor):
            return forward(self, x)

    torch.manual_seed(0)
    return Custom()


def linear(in_features: int = 6, out_features: int = 6, **options) -> nn.Linear:
    torch.manual_seed(in_features + 10 * out_features)
    return nn.Linear(in_features, out_features, **options)


def with_deprecated_norm(norm) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = nn.Sequential(norm(linear(6, 5)), nn.Tanh(), norm(linear(5, 3)))
        with torch.no_grad():  # makes the module copyable
            module(torch.randn(4, 6))
    return module.eval()


def jacobian(module: nn.Module, x: Tensor, names: list[str] | None = None) -> Tensor:
    """Return the gradients of all outputs by all parameters, one sample and output at a time, in float64: (k, d, p)."""
    module = copy.deepcopy(module).double()
    parameters = [p.requires_grad_() for name, p in module.named_parameters() if names is None or name in names]
    rows = []
    for sample in x:
        outputs = module(sample[None]).flatten()
        gradients = [
            torch.autograd.grad(o, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
            for o in outputs
        ]
        rows.append(torch.stack([torch.cat([g.to_dense().flatten() for g in output]) for output in gradients]))
    return torch.stack(rows)


def explicit_kernel(module: nn.Module, x: Tensor, y: Tensor, names: list[str] | None = None) -> Tensor:
    left = jacobian(module, x, names)
    return inner_products(left, left if y is x else jacobian(module, y, names))


def inner_products(left: Tensor, right: Tensor) -> Tensor:
    """Return the kernel (k, l) of two Jacobians (k, d, p) and (l, d, p): inner products, averaged over outputs."""
    return torch.einsum("kop,lop->kl", left, right) / left.shape[1]


torch.manual_seed(1)
VECTORS = torch.randn(7, 6, dtype=torch.float64)
SEQUENCES = torch.randn(5, 3, 6, dtype=torch.float64)
TOKENS = torch.randint(0, 9, (6, 4))
IMAGES = torch.randn(4, 3, 6, 6, dtype=torch.float64)
