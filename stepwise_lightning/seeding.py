"""Seeds and random numbers derived from a key, independent of execution order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from stepwise_lightning.errors import UserError

# Leaves room for seeds derived by adding a number.
_MAX_GLOBAL_SEED = 2**62
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2⁶⁴ over the golden ratio: the increment of SplitMix64


def hashed_seed(*key: int | str) -> int:
    """Return a 64-bit seed that depends on ``key`` only and is equal in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def checked_seed(seed: int | None) -> int:
    """Return ``seed``, or torch's global seed for None; raise a ValueError if torch does not accept it.

    The global seed is the argument of the last ``seed_everything`` or ``torch.manual_seed``, and does not depend on the
    random numbers drawn since. Without such a call it differs in every process.
    """
    if seed is None:
        return torch.initial_seed() % _MAX_GLOBAL_SEED
    if not -(2**63) <= seed < 2**63:
        raise UserError(f"seed must have 64 bits or less, got {seed}")
    return seed


@contextmanager
def isolated_rng(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed torch's generators of the CPU and of a CUDA device within the context; restore their states afterwards."""
    devices = [device.index] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        # torch.manual_seed would seed all accelerators, which takes 0.2 ms.
        for generator in (torch.default_generator, *(torch.cuda.default_generators[index] for index in devices)):
            generator.manual_seed(seed)
        yield


@contextmanager
def seeded_on_cpu(seed: int | None) -> Iterator[None]:
    """Create tensors on the CPU from :func:`checked_seed`, whatever torch's default device is.

    :func:`isolated_rng` does not seed the generators of other devices.
    """
    with isolated_rng(checked_seed(seed)), torch.device("cpu"):
        yield


def default_device() -> torch.device:
    """Return torch's default device; ``torch.get_default_device`` of torch 2.6 ignores ``with torch.device(…)``."""
    return torch.empty(0).device


def uniform(
    seed: int, epochs: Sequence[int] | Tensor, indices: Sequence[int] | Tensor, view: int, count: int
) -> Tensor:
    """Return ``count`` uniform numbers in [0, 1) for each (epoch, index): float64, (samples, count).

    Number k of a sample is a function of (seed, view, epoch, index, k): the output function of SplitMix64 (Steele, Lea,
    Flood, *Fast Splittable Pseudorandom Number Generators*, OOPSLA 2014), applied once for each part of the key.
    """
    state = np.full(len(epochs), np.uint64(hashed_seed(seed, view)))
    for key in (epochs, indices):
        state = _mix(state + _GOLDEN * np.asarray(key, np.int64).astype(np.uint64))
    counters = np.arange(1, count + 1, dtype=np.uint64)
    bits = _mix(state[:, None] + _GOLDEN * counters)
    return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _mix(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
