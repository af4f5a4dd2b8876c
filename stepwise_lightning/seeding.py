"""Random numbers that depend on what they are for, and on nothing that happens to run before."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stepwise_lightning.errors import UserError

__all__ = ["checked_seed", "hashed_seed", "isolated_rng"]


def hashed_seed(*key: int | str) -> int:
    """Return a seed of 64 bits that depends on all of ``key`` and is the same in every process, on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def checked_seed(seed: int) -> int:
    """Return ``seed``; ValueError if torch could not take it."""
    if not -(2**63) <= seed < 2**63:
        raise UserError(f"seed must have 64 bits or less, got {seed}")
    return seed


@contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Let what torch draws within come from ``seed``, and leave its global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which takes 0.2 ms to seed accelerators too.
        torch.default_generator.manual_seed(seed)
        yield
