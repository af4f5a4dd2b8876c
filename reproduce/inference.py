"""Exact inference from independent runs: probability of success, paired differences, and the interval of a new run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

Array = np.ndarray[Any, Any]


def success_bound(successes: int, runs: int, confidence: float = 0.95) -> float:
    """Return the one-sided lower confidence bound of a probability (Clopper and Pearson, Biometrika 26, 1934)."""
    test = stats.binomtest(successes, runs, alternative="greater")
    return float(test.proportion_ci(confidence, method="exact").low)


@dataclass(frozen=True)
class PairedDifference:
    """Location of symmetrically distributed paired differences: estimate, two-sided interval, and a one-sided p."""

    estimate: float
    low: float
    high: float
    p: float


def paired_difference(differences: Sequence[float], confidence: float = 0.95) -> PairedDifference:
    """Return Hodges and Lehmann's estimate with the exact interval and p-value of the signed-rank test.

    The estimate is the median of the Walsh averages (dᵢ + dⱼ)/2, i ≤ j. The interval contains the shifts that the test
    over all 2ⁿ sign flips does not reject (Hodges and Lehmann, Ann. Math. Statist. 34, 1963); with ties it is
    conservative. Without enough differences for the confidence, it is infinite.

    Args:
        differences: d, (n,); NaN counts as negative infinity.
        confidence: of the two-sided interval.

    Returns:
        The p-value is for the alternative that the differences are positive.

    """
    d = np.nan_to_num(np.asarray(differences, float), nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    n = len(d)
    i, j = np.triu_indices(n)
    with np.errstate(invalid="ignore"):
        walsh = np.sort(np.nan_to_num((d[i] + d[j]) / 2, nan=0.0, posinf=math.inf, neginf=-math.inf))
    # The number of averages below the interval: the largest k with P(T < k) ≤ (1 − confidence)/2.
    tail = np.cumsum(_rank_sums(2 * np.arange(1, n + 1))[::2])
    below = int(np.searchsorted(tail, (1 - confidence) / 2, side="right"))
    low, high = (float(walsh[below - 1]), float(walsh[-below])) if below else (-math.inf, math.inf)
    return PairedDifference(float(np.median(walsh)), low, high, _signed_rank_p(d))


def _signed_rank_p(d: Array) -> float:
    """Return the share of sign flips with at least this rank sum of positive differences, without zeros."""
    d = d[d != 0]
    ranks = np.rint(2 * stats.rankdata(np.abs(d))).astype(int)
    return float(min(_rank_sums(ranks)[ranks[d > 0].sum() :].sum(), 1.0))


def _rank_sums(ranks: Array) -> Array:
    """Return the probabilities of the sums 0, 1, … of a random subset of integer ranks."""
    probabilities = np.ones(1)
    for rank in ranks:
        probabilities = (np.pad(probabilities, (0, rank)) + np.pad(probabilities, (rank, 0))) / 2
    return probabilities


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values adjusted for the number of tests (Holm, Scand. J. Statist. 6, 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min((len(p_values) - rank) * p_values[index], 1.0))
        adjusted[index] = largest
    return adjusted


def prediction_interval(values: Sequence[float], level: float) -> tuple[float, float] | None:
    """Return the interval of Student's t for the number of one more run, or None if a number is not finite."""
    if len(values) < 2 or not np.isfinite(values).all():
        return None
    width = stats.t.ppf((1 + level) / 2, len(values) - 1) * np.std(values, ddof=1) * math.sqrt(1 + 1 / len(values))
    return float(np.mean(values) - width), float(np.mean(values) + width)
