"""Data types, autocast and threads of numerical code. Does not import Lightning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from stepwise_lightning.errors import UserError

# Tensors, NumPy arrays, numbers, and nested lists of numbers.
TensorLike = Tensor | ArrayLike

# Device types without float64; their tensors are moved to the CPU before a cast to float64.
_WITHOUT_FLOAT64 = ("mps",)

_BACKENDS: Any = torch.backends
# Settings by which a user may allow TF32 or bfloat16 inside float32 operations, with the value that forbids it.
_FLOAT32_SETTINGS: list[tuple[Any, str, Any]] = (
    [
        (_BACKENDS.cuda.matmul, "fp32_precision", "ieee"),
        (_BACKENDS.cudnn.conv, "fp32_precision", "ieee"),
        (_BACKENDS.cudnn.rnn, "fp32_precision", "ieee"),
        (_BACKENDS.mkldnn.matmul, "fp32_precision", "ieee"),
        (_BACKENDS.mkldnn.conv, "fp32_precision", "ieee"),
    ]
    if hasattr(_BACKENDS.cudnn, "conv")  # from torch 2.9
    else [(_BACKENDS.cuda.matmul, "allow_tf32", False), (_BACKENDS.cudnn, "allow_tf32", False)]
)

P = ParamSpec("P")
T = TypeVar("T")


def check_real(tensor: Tensor, name: str) -> None:
    """Raise a ValueError that contains ``name`` for a complex tensor, or for a tensor on the device 'meta'."""
    if tensor.is_complex():
        raise UserError(
            f"{name} must be real, got {tensor.dtype}: take .real, or both parts as features by torch.view_as_real"
        )
    if tensor.device.type == "meta":
        raise UserError(f"{name} must have values, got a tensor on the device 'meta'")


def check_finite(tensor: Tensor, name: str, remedy: str = "check the data") -> None:
    """Raise a ValueError that contains ``name`` and ``remedy`` for NaN or infinite values."""
    if not tensor.isfinite().all():
        raise UserError(f"{name} contain NaN or infinite values: {remedy}")


def as_tensor(values: TensorLike, name: str = "the input") -> Tensor:
    """Return a tensor unchanged, and an array or numbers as a CPU tensor of the same type (Python floats: float64).

    Raises:
        ValueError: values that are not numbers, or rows of different lengths.

    """
    if isinstance(values, Tensor):
        return values
    try:
        array = np.asarray(values)
        # a copy in native byte order, because torch refuses negative strides, read-only memory and other byte orders
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
    except (TypeError, ValueError, RuntimeError):
        kind = f"an array of {values.dtype}" if isinstance(values, np.ndarray) else type(values).__name__
        raise UserError(f"{name} must be a tensor, an array or rows of numbers of one length, got {kind}") from None


def float64_device(device: torch.device | str) -> torch.device:
    """Return the device if it supports float64, else the CPU (for Apple GPUs)."""
    device = torch.device(device)
    return torch.device("cpu") if device.type in _WITHOUT_FLOAT64 else device


def on_float64_device(tensor: Tensor) -> Tensor:
    """Return the tensor on :func:`float64_device` of its device.

    Cast in a separate call afterwards: a combined call would cast before the move.
    """
    return tensor.to(float64_device(tensor.device))


def as_float64(values: TensorLike, name: str = "the input") -> Tensor:
    """Return the values as a float64 tensor, on their device if it supports float64, else on the CPU.

    Integers and booleans are converted, exactly up to 2⁵³; Python floats keep full precision. Raises a ValueError that
    contains ``name`` for complex values, tensors on the device 'meta', and values that are not numbers.
    """
    tensor = as_tensor(values, name)
    check_real(tensor, name)
    return on_float64_device(tensor).double()


def float64_pair(x: TensorLike, y: TensorLike, name: str) -> tuple[Tensor, Tensor]:
    """Return :func:`as_float64` of both, on the device of the first; errors name "the first" and "the second"."""
    x = as_float64(x, f"the first {name}")
    return x, as_float64(y, f"the second {name}").to(x.device)


def in_full_precision(
    function: Callable[Concatenate[Tensor, Tensor, P], T],
) -> Callable[Concatenate[Tensor, Tensor, P], T]:
    """Decorate a function of two tensors: cast half precision to float32 and disable autocast inside.

    In half precision the squares of small embeddings underflow, and the squares of large ones overflow.
    """

    @wraps(function)
    def wrapped(z1: Tensor, z2: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with without_autocast(z1.device):
            return function(at_least_float32(z1), at_least_float32(z2), *args, **kwargs)

    return wrapped


def at_least_float32(tensor: Tensor) -> Tensor:
    """Cast float16 and bfloat16 to float32; return other tensors unchanged."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context that disables ``torch.autocast`` on a device."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


@contextmanager
def without_tf32() -> Iterator[None]:
    """Compute float32 products and convolutions in float32, also if TF32 or bfloat16 is allowed inside them.

    TF32 has 11 significant bits, and is the default of cuDNN for convolutions.
    """
    before = [getattr(owner, name) for owner, name, _ in _FLOAT32_SETTINGS]
    allowed = _cudnn_allows_tf32()
    try:
        if allowed:  # otherwise torch.backends.cudnn.flags raises an error inside this context
            torch.backends.cudnn.allow_tf32 = False
        for owner, name, value in _FLOAT32_SETTINGS:
            setattr(owner, name, value)
        yield
    finally:
        if allowed:
            torch.backends.cudnn.allow_tf32 = True
        for (owner, name, _), value in zip(_FLOAT32_SETTINGS, before, strict=True):
            setattr(owner, name, value)


def _cudnn_allows_tf32() -> bool:
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:  # only the settings of single operations are in use
        return False


@contextmanager
def single_threaded() -> Iterator[None]:
    """Run torch in one thread: faster for many small operations, in which several threads mostly wait."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(number)
