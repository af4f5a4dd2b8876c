"""Communication between the ranks of training; of theory: ``sharing.py``. No other file imports torch.distributed.

Why the gradient is exact. W ranks hold the shards z_r of one batch Z = (z_0, …, z_{W−1}). Each gathers Z and computes
its loss L_r(Z), and gradients are averaged over ranks (as DDP does), so what is followed is the gradient of
(1/W) Σ_r L_r. As every rank computes the same loss L_r = L of the same Z, that is the gradient of L: what one process
computes on the joined batch. For it, each shard must hear from all ranks: the adjoint of the gather sums the gradients
over ranks and hands each its own rows, ∂(Σ_r L_r)/∂z_r = W ∂L/∂z_r. Back-propagated into the weights θ and averaged,
(1/W) Σ_r (∂z_r/∂θ)ᵀ W ∂L/∂z_r = dL/dθ. Without the sum (an in-place ``all_gather`` or ``all_reduce``), the gradient
comes out W times too small.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stepwise_lightning.errors import UserError

__all__ = ["all_gather", "all_gather_objects", "all_gather_with_grad", "check_equal_shards"]


def all_gather_with_grad(z: Tensor) -> Tensor:
    """Return the rows of all ranks, differentiably: (n, …) to (W·n, …), rank 0's first; ``z`` itself in one process.

    All ranks must call this in the same order with shards of the same shape: see :func:`check_equal_shards`.
    """
    return _Gather.apply(z) if is_distributed() else z


def check_equal_shards(view: Tensor) -> None:
    """Raise if the ranks hold unequal numbers of samples in ``view`` (n, …); all ranks must call this together.

    On a CPU the back-end would abort the process without saying why. On a GPU nothing is checked: it would stall the
    queue at every step. There the back-end reports the mismatch itself, or times out.

    Raises:
        ValueError: unequal shards.

    """
    if not is_distributed() or view.device.type != "cpu":
        return
    sizes = torch.empty(dist.get_world_size(), dtype=torch.long)
    dist.all_gather_into_tensor(sizes, torch.tensor([len(view)]))
    if (sizes != len(view)).any():
        raise UserError(
            f"every rank must hold equally many samples, but they hold {sizes.tolist()}: "
            "use a distributed sampler and drop_last=True"
        )


def all_gather(x: Tensor) -> Tensor:
    """Stack what R processes hold, in rank order: (…) of equal shapes to (R, …), without gradients."""
    return all_gather_with_grad(x.detach()[None])


def all_gather_objects(own: Any) -> list[Any]:
    """Return what all ranks hold, in rank order, of any picklable type; all must call this together."""
    if not is_distributed():
        return [own]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return everyone


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        rows = z.new_empty(dist.get_world_size() * len(z), *z.shape[1:])
        dist.all_gather_into_tensor(rows, z.contiguous())
        return rows

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # A copy, because autograd may hand the same tensor to other branches and all_reduce writes in place.
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return own_rows(gradient)


def own_rows(rows: Tensor) -> Tensor:
    # A copy, because a following layer may work in place, as torchvision's ReLUs do.
    return rows.chunk(dist.get_world_size())[dist.get_rank()].clone()


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
