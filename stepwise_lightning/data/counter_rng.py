"""Random numbers with an address: each a function of what it is for, so that any number of them is drawn at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from stepwise_lightning.seeding import hashed_seed

__all__ = ["uniforms"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2⁶⁴ over the golden ratio: the increment of SplitMix64


def uniforms(seed: int, epochs: Sequence[int], indices: Sequence[int], view: int, count: int) -> Tensor:
    """Return ``count`` numbers, uniform in [0, 1), for each (epoch, index): float64, (samples, count).

    Number k of a sample is a function of (seed, view, epoch, index, k) alone: a counter-based generator, with the
    output function of SplitMix64 (Steele, Lea, Flood, *Fast Splittable Pseudorandom Number Generators*, OOPSLA 2014)
    applied once for each part of the address.

    Args:
        seed: of everything.
        epochs: of each sample; may be negative.
        indices: of each sample, as many.
        view: which of the sample's views.
        count: numbers for each.

    """
    state = np.full(len(epochs), np.uint64(hashed_seed(seed, view)))
    for part in (epochs, indices):
        state = _mixed(state + _GOLDEN * np.asarray(part, np.int64).astype(np.uint64))
    counters = np.arange(1, count + 1, dtype=np.uint64)
    bits = _mixed(state[:, None] + _GOLDEN * counters)
    return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def _mixed(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
