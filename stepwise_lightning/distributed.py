"""Communication between training ranks. Only this module and ``theory/process_group.py`` call collectives.

The gradient of W ranks equals the gradient of one process on the joined batch. Rank r holds the shard z_r of
Z = (z_0, …, z_{W−1}), gathers Z, and computes the same loss L(Z). The adjoint of the gather sums the gradients over
ranks and returns each rank its rows, ∂(Σ_r L_r)/∂z_r = W ∂L/∂z_r. Back-propagated into the weights θ and averaged over
ranks by DDP, this is (1/W) Σ_r (∂z_r/∂θ)ᵀ W ∂L/∂z_r = dL/dθ. Without the sum (in-place ``all_gather`` or
``all_reduce``), the gradient would be too small by a factor W.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stepwise_lightning.asynchronous import CopyToCPU
from stepwise_lightning.errors import UserError


def is_distributed() -> bool:
    """Return True if several ranks run in a process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def backends() -> dict[str, str]:
    """Return the back-end of the process group by type of device, such as ``{"cpu": "gloo", "cuda": "nccl"}``."""
    return dict(pair.split(":") for pair in dist.get_backend_config().split(","))


def all_gather_with_grad(z: Tensor) -> Tensor:
    """Gather the rows of all ranks, differentiably: (n, …) to (W·n, …), in rank order; return ``z`` in one process.

    All ranks must call this in the same order, with shards of equal shape: see :func:`check_equal_shards`.
    """
    return _Gather.apply(z) if is_distributed() else z


def check_equal_shards(view: Tensor) -> None:
    """Raise an error if the ranks hold different numbers of samples in ``view`` (n, …). All ranks must call this.

    On a CPU, unequal shards would abort the process without a message. On a GPU nothing is checked, because that would
    stall the queue at every step; NCCL reports the mismatch or times out.
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
    """Stack tensors of equal shape (…) from R ranks, in rank order: (R, …), without gradients."""
    return all_gather_with_grad(x.detach()[None])


def all_gather_objects(item: Any) -> list[Any]:
    """Return the picklable objects of all ranks, in rank order. All ranks must call this."""
    if not is_distributed():
        return [item]
    items = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


class DelayedAny:
    """Agreement of all ranks on a flag, one call late, without waiting for a GPU.

    All ranks must call the object equally often. The reduction started by one call ends during the training step before
    the next call.

    Args:
        device: device of the process group.

    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._work: Any = None
        self._any: Tensor | CopyToCPU | None = None

    def __call__(self, flag: bool) -> bool:
        """Return True if any rank passed True to the previous call; in one process, return ``flag``."""
        if not is_distributed():
            return flag
        if self._any is not None:
            if isinstance(self._any, Tensor):
                self._work.wait()
            if self._any if isinstance(self._any, Tensor) else self._any.result():
                return True
        self._any = torch.full((), int(flag), dtype=torch.int32, device=self._device)  # a fill, not a copy
        self._work = dist.all_reduce(self._any, dist.ReduceOp.MAX, async_op=True)
        if self._any.is_cuda:
            self._work.wait()  # of the stream, not of the CPU
            self._any = CopyToCPU(self._any)
        return False


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        rows = z.new_empty(dist.get_world_size() * len(z), *z.shape[1:])
        dist.all_gather_into_tensor(rows, z.contiguous())
        return rows

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # Copy, because autograd may pass the same tensor to other branches and all_reduce is in place.
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return local_rows(gradient)


def local_rows(rows: Tensor) -> Tensor:
    """Return a copy of this rank's rows of a gathered tensor."""
    # A copy, because the next layer may work in place, as torchvision's ReLUs do.
    return rows.chunk(dist.get_world_size())[dist.get_rank()].clone()
