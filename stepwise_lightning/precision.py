"""In which type and where numbers are computed. Knows nothing of Lightning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from stepwise_lightning.errors import UserError

__all__ = ["as_float64", "check_real", "single_threaded", "on_float64_device", "without_autocast"]

# Types of device that have no float64: what is to be float64 is moved to the CPU first.
_WITHOUT_FLOAT64 = ("mps",)


def check_real(tensor: Tensor, name: str) -> None:
    """Refuse a complex tensor, whose imaginary part a cast would drop, and one of the device 'meta', without values.

    Raises:
        ValueError: it is one of them; the error calls it by ``name``.

    """
    if tensor.is_complex():
        raise UserError(
            f"{name} must be real, got {tensor.dtype}: take .real, or both parts as features by torch.view_as_real"
        )
    if tensor.device.type == "meta":
        raise UserError(f"{name} must hold values, got a tensor on the device 'meta', which has none")


def on_float64_device(tensor: Tensor) -> Tensor:
    """Return the tensor where it can be float64: on its own device, or on the CPU where that has none (Apple's GPUs).

    The cast comes after the move, as a call of its own: one call for both would cast on the device.
    """
    return tensor.cpu() if tensor.device.type in _WITHOUT_FLOAT64 else tensor


def as_float64(values: Tensor | ArrayLike, name: str = "the input") -> Tensor:
    """Return the values as float64, on their device, or on the CPU where that has no float64.

    Integers and truth values are converted: exactly, up to 2⁵³. Python's own floats keep all their digits.

    Raises:
        ValueError: it is complex, or holds no values; the error calls it by ``name``.

    """
    # By way of NumPy, because torch.as_tensor makes float32 of Python's floats.
    tensor = values if isinstance(values, Tensor) else torch.tensor(np.asarray(values))
    check_real(tensor, name)
    return on_float64_device(tensor).double()


@contextmanager
def single_threaded() -> Iterator[None]:
    """Compute in one thread, which is for many small operations.

    Several would wait for each other at each of them, and where a machine does other work for as long as that keeps one
    of them waiting.
    """
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(number)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which ``torch.autocast`` rounds nothing on this device."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
