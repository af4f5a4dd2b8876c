"""Claims: a measured number with a bound, over all seeds, and a control that must violate the bound.

A claim that ``python -m reproduce confirm`` has confirmed is judged by the interval in which a new run is expected.
"""

from __future__ import annotations

import operator
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

_RELATIONS: dict[str, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge}
_OPPOSITES: dict[str, Callable[[float, float], bool]] = {"<=": operator.gt, ">=": operator.lt}


@dataclass
class Claim:
    """A statement ``measured relation bound``, with relation ``<=`` or ``>=``.

    A claim with a control holds only if the same quantity, measured on the control, violates the bound. This excludes
    numbers that a broken experiment reaches too.
    """

    name: str
    description: str
    measured: float
    relation: str
    bound: float
    control: str = ""
    """Description of the control; empty without one."""
    control_value: float | None = None
    """The quantity measured on the control."""
    values: list[float] = field(default_factory=list)
    """Measured number of each seed; empty if the claim pools several numbers of a seed."""
    control_values: list[float] = field(default_factory=list)
    """The same for the control."""
    interval: list[float] = field(default_factory=list)
    """Prediction interval of a new run, [low, high], if the claim was confirmed. It then replaces the bound: the number
    of every seed must lie in it, and no number of the control."""
    holds: bool = field(init=False)

    def __post_init__(self) -> None:
        if self.interval:
            low, high = self.interval
            satisfied = all(low <= value <= high for value in self.values or [self.measured])
        else:
            satisfied = _RELATIONS[self.relation](self.measured, self.bound)
        self.holds = satisfied and self.control_fails

    @property
    def control_fails(self) -> bool:
        """Return whether the control violates the bound; True without a control, False for NaN."""
        if self.control_value is None:
            return True
        if self.interval:
            low, high = self.interval
            return all(value < low or value > high for value in self.control_values or [self.control_value])
        return _OPPOSITES[self.relation](self.control_value, self.bound)

    @property
    def distance(self) -> float:
        """Distance of the measured number from its bound, or from the end of its interval; negative if violated."""
        if self.interval:
            low, high = self.interval
            return min(min(value - low, high - value) for value in self.values or [self.measured])
        return self.bound - self.measured if self.relation == "<=" else self.measured - self.bound

    @property
    def criterion(self) -> str:
        """The bound, such as ``<= 0.5``, or the interval."""
        if self.interval:
            return f"in {self.interval[0]:.4g} to {self.interval[1]:.4g}"
        return f"{self.relation} {self.bound:.4g}"

    def __str__(self) -> str:
        verdict = "holds" if self.holds else "FAILS"
        control = "" if self.control_value is None else f"; {self.control}: {self.control_value:.4g}"
        return f"  {verdict}  {self.description}: {self.measured:.4g} ({self.criterion}{control})"


def worst(
    name: str,
    description: str,
    values: Iterable[float],
    relation: str,
    bound: float,
    seeds: Sequence[int],
    control: str = "",
    control_values: Iterable[float] = (),
) -> Claim:
    """Return the claim about the worst value over seeds, and the control value closest to satisfying the bound."""
    choose, extreme, nearest = (max, "maximum", min) if relation == "<=" else (min, "minimum", max)
    sentence = f"{description}, {extreme} over {seeds_text(seeds)}"
    values, control_values = list(values), list(control_values)
    numbers = choose(values), relation, bound, control, nearest(control_values, default=None)
    return Claim(name, sentence, *numbers, _by_seed(values, seeds), _by_seed(control_values, seeds))


def average(
    name: str,
    description: str,
    values: Sequence[float],
    relation: str,
    bound: float,
    seeds: Sequence[int],
    control: str = "",
    control_values: Sequence[float] = (),
    mean: Callable[[Iterable[float]], float] = statistics.fmean,
) -> Claim:
    """Return the claim about the mean over seeds, compared with the mean of the control.

    Use ``statistics.geometric_mean`` for factors. The description lists the individual values.
    """
    individual = f" ({', '.join(f'{value:.3g}' for value in values)})" * (len(values) > 1)
    sentence = f"{description}, mean over {seeds_text(seeds)}{individual}"
    numbers = mean(values), relation, bound, control, mean(control_values) if control_values else None
    return Claim(name, sentence, *numbers, _by_seed(values, seeds), _by_seed(control_values, seeds))


def _by_seed(values: Sequence[float], seeds: Sequence[int]) -> list[float]:
    return list(values) if len(values) == len(seeds) else []


def seeds_text(seeds: Sequence[int]) -> str:
    """Return ``seeds 0, 1, 2``."""
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def read_claim(saved: Any) -> Claim:
    """Return a claim from ``claims.json``, judged again; ValueError, KeyError or TypeError if it is damaged."""
    texts = str(saved["name"]), str(saved["description"])
    # Early versions wrote no controls, and no values of single seeds.
    value = saved.get("control_value")
    control = str(saved.get("control", "")), None if value is None else float(value)
    lists = ([float(value) for value in saved.get(key, [])] for key in ("values", "control_values", "interval"))
    return Claim(*texts, float(saved["measured"]), saved["relation"], float(saved["bound"]), *control, *lists)


def claims_table(claims: Iterable[tuple[str, Claim]]) -> str:
    """Return a table with one line per (figure name, claim): measured value, bound, distance and control."""
    rows = [("", "claim", "measured", "bound", "distance", "control", "measured")]
    for figure, claim in claims:
        control = ("-", "") if claim.control_value is None else (claim.control, f"{claim.control_value:.4g}")
        rows.append((
            "holds" if claim.holds else "FAILS", f"{figure}: {claim.name}", f"{claim.measured:.4g}",
            claim.criterion, f"{claim.distance:.2g}", *control,
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
