"""Seeds derived from a key, independent of execution order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stepwise_lightning.errors import UserError

__all__ = ["checked_seed", "hashed_seed", "isolated_rng"]


def hashed_seed(*key: int | str) -> int:
    """Return a 64-bit seed that depends on ``key`` only and is equal in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def checked_seed(seed: int) -> int:
    """Return ``seed``; raise a ValueError if torch does not accept it."""
    if not -(2**63) <= seed < 2**63:
        raise UserError(f"seed must have 64 bits or less, got {seed}")
    return seed


@contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Seed torch's global generator within the context and restore its state afterwards."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also seed accelerators, which takes 0.2 ms.
        torch.default_generator.manual_seed(seed)
        yield
