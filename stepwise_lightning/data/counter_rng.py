"""Counter-based random numbers: each depends only on its key, so batches of any composition can be drawn at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from stepwise_lightning.seeding import hashed_seed

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2⁶⁴ over the golden ratio: the increment of SplitMix64


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
