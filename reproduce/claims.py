"""Claims: sentences with a number, judged over all seeds, each beside a control that it must not be true of."""

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
    """One sentence with a number: ``measured relation bound``, relation ``<=`` or ``>=``.

    A number that a broken experiment would reach as well says nothing. So a claim can name a control, and then holds
    only if the control, measured in the same way, is on the other side of the bound.
    """

    name: str
    description: str
    measured: float
    relation: str
    bound: float
    control: str = ""
    """What must fail this claim; empty for none."""
    control_value: float | None = None
    """The same number of the control."""
    holds: bool = field(init=False)

    def __post_init__(self) -> None:
        self.holds = _RELATIONS[self.relation](self.measured, self.bound) and self.control_fails

    @property
    def control_fails(self) -> bool:
        """Whether the control, where there is one, is on the other side of the bound; NaN is on neither."""
        return self.control_value is None or _OPPOSITES[self.relation](self.control_value, self.bound)

    @property
    def distance(self) -> float:
        """How far the number is from its bound, in its own unit; negative beyond it."""
        return self.bound - self.measured if self.relation == "<=" else self.measured - self.bound

    def __str__(self) -> str:
        verdict = "holds" if self.holds else "FAILS"
        control = "" if self.control_value is None else f"; {self.control}: {self.control_value:.4g}"
        return f"  {verdict}  {self.description}: {self.measured:.4g} ({self.relation} {self.bound:.4g}{control})"


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
    """Return the claim about the value that is farthest off, and say of which seeds; a value or several for each.

    Of the control's values the claim has that which comes nearest to the bound, or is farthest beyond it.
    """
    choose, word, nearest = (max, "most", min) if relation == "<=" else (min, "least", max)
    sentence = f"{description}, {word} of {seeds_text(seeds)}"
    return Claim(name, sentence, choose(values), relation, bound, control, nearest(control_values, default=None))


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
    """Return the claim about the mean over seeds, with the values that it is of, where one seed says too little.

    Of factors it is ``statistics.geometric_mean``. The control's is its own.
    """
    each = f" ({', '.join(f'{value:.3g}' for value in values)})" * (len(values) > 1)
    beside = mean(control_values) if control_values else None
    return Claim(
        name, f"{description}, mean of {seeds_text(seeds)}{each}", mean(values), relation, bound, control, beside
    )


def seeds_text(seeds: Sequence[int]) -> str:
    """Return ``seeds 0, 1, 2``."""
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def read_claim(saved: Any) -> Claim:
    """Return a claim from ``claims.json``, judged anew; ValueError, KeyError or TypeError if it is damaged."""
    words = str(saved["name"]), str(saved["description"])
    # Files of before there were controls have none.
    value = saved.get("control_value")
    control = str(saved.get("control", "")), None if value is None else float(value)
    return Claim(*words, float(saved["measured"]), saved["relation"], float(saved["bound"]), *control)


def claims_table(claims: Iterable[tuple[str, Claim]]) -> str:
    """Return one line a claim, each with the name of its figure: how far it is from its bound, and what fails it."""
    rows = [("", "claim", "measured", "bound", "distance", "fails it", "measured")]
    for figure, claim in claims:
        control = ("-", "") if claim.control_value is None else (claim.control, f"{claim.control_value:.4g}")
        rows.append((
            "holds" if claim.holds else "FAILS", f"{figure}: {claim.name}", f"{claim.measured:.4g}",
            f"{claim.relation} {claim.bound:.4g}", f"{claim.distance:.2g}", *control,
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
