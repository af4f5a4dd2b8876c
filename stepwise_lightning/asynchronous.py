"""Copies between the CPU and CUDA devices for which the CPU does not wait."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device; from the CPU to a CUDA device through pinned memory, without waiting."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class CopyToCPU:
    """Copy of a tensor to the CPU, which :meth:`result` returns.

    On a CUDA device, ``result`` waits for the operations queued before the copy, but not for later ones: the device has
    work while the CPU reads.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._copied = None
        if tensor.is_cuda:
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype).pin_memory()
            self._tensor.copy_(tensor.detach(), non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(tensor.device))
        else:
            self._tensor = tensor.detach().cpu()

    def result(self) -> Tensor:
        """Return the tensor on the CPU."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensor
