"""Which type numbers are computed in: float64 in theory and measures, at least float32 in losses. Knows no Lightning."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from stepwise_lightning.errors import UserError

__all__ = ["as_float64", "check_real", "on_float64_device", "without_autocast"]

# Types of device that have no float64: what is to be float64 is moved to the CPU first.
_WITHOUT_FLOAT64 = ("mps",)


def check_real(**tensors: Tensor) -> None:
    """Refuse complex tensors, whose imaginary part a cast would drop, and meta tensors, by the name they are given.

    Raises:
        ValueError: one of them is complex, or holds no values.

    """
    for name, tensor in tensors.items():
        label = name.replace("_", " ")
        if tensor.is_complex():
            raise UserError(
                f"{label} must be real, got {tensor.dtype}: take the real part, or give real and imaginary part as two "
                "features (torch.view_as_real)"
            )
        if tensor.device.type == "meta":
            raise UserError(f"{label} must hold values, got a tensor on the device 'meta', which has none")


def on_float64_device(tensor: Tensor) -> Tensor:
    """Return the tensor where it can be float64: on its own device, or on the CPU where that has none (Apple's GPUs).

    The cast comes after the move, as a call of its own: one call for both would cast on the device.
    """
    return tensor.cpu() if tensor.device.type in _WITHOUT_FLOAT64 else tensor


def as_float64(tensor: Tensor, name: str = "the input") -> Tensor:
    """Return the tensor as float64, on its device, or on the CPU where its device has no float64.

    Integers and truth values are converted: exactly, up to 2⁵³.

    Raises:
        ValueError: it is complex, or holds no values; the error calls it by ``name``.

    """
    check_real(**{name: tensor})
    return on_float64_device(tensor).double()


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which ``torch.autocast`` rounds nothing on this device."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
