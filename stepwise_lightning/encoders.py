"""Encoders: modules that take a batch of images and return embeddings (n, d)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LinearEncoder(nn.Module):
    """The linear model f(x) = W x on flattened inputs, without a bias.

    Args:
        in_features: m, the number of pixels times channels.
        out_features: d, the embedding dimension.
        init_std: standard deviation of the normal distribution that W is drawn from; None for the ordinary
            initialisation of ``torch.nn.Linear``, uniform on ±1/√m.
        seed: seed of that draw, so that it depends on nothing else.

    Raises:
        ValueError: a dimension below 1, or a standard deviation that is not finite and ≥ 0.

    """

    def __init__(self, in_features: int, out_features: int, init_std: float | None = None, seed: int = 0) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(f"a linear encoder needs in_features, out_features ≥ 1, got {in_features}, {out_features}")
        if init_std is not None and not 0 <= init_std < float("inf"):
            raise ValueError(f"init_std must be finite and ≥ 0, got {init_std}")
        generator = torch.Generator().manual_seed(seed)
        weight = torch.empty(out_features, in_features)
        if init_std is None:
            bound = in_features**-0.5
            weight.uniform_(-bound, bound, generator=generator)
        else:
            weight.normal_(0, init_std, generator=generator)
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, …) inputs with m elements each to (n, d)."""
        # For d ≪ m this order of the product runs about twice as fast on a CPU as x Wᵀ.
        return (self.weight @ x.flatten(1).T).T
