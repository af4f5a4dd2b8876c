"""Networks of any kind, small and drawn from a fixed seed, and what they are given."""

import warnings

import torch
from torch import Tensor, nn


def made(forward, **named: nn.Module | nn.Parameter | Tensor) -> nn.Module:
    """Return a module with these layers, parameters or buffers and ``forward(self, x)``."""

    class Made(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in named.items():
                if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                    self.register_buffer(name, value)
                else:
                    setattr(self, name, value)

        def forward(self, x: Tensor):
            return forward(self, x)

    torch.manual_seed(0)
    return Made()


def linear(wide: int = 6, narrow: int = 6, **options) -> nn.Linear:
    torch.manual_seed(wide + 10 * narrow)
    return nn.Linear(wide, narrow, **options)


def with_old(norm) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = nn.Sequential(norm(linear(6, 5)), nn.Tanh(), norm(linear(5, 3)))
        with torch.no_grad():  # or the module could not be copied
            module(torch.randn(4, 6))
    return module.eval()


torch.manual_seed(1)
VECTORS = torch.randn(7, 6, dtype=torch.float64)
SEQUENCES = torch.randn(5, 3, 6, dtype=torch.float64)
TOKENS = torch.randint(0, 9, (6, 4))
IMAGES = torch.randn(4, 3, 6, 6, dtype=torch.float64)
