"""Seeds derived from a key, independent of execution order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stepwise_lightning.errors import UserError

# Leaves room for seeds derived by adding a number.
_MAX_GLOBAL_SEED = 2**62


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
