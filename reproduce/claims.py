"""Claims: sentences with a number, judged over all seeds."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

_RELATIONS: dict[str, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge}


@dataclass
class Claim:
    """One sentence with a number: ``measured relation bound``, relation ``<=`` or ``>=``."""

    name: str
    description: str
    measured: float
    relation: str
    bound: float
    holds: bool = field(init=False)

    def __post_init__(self) -> None:
        self.holds = _RELATIONS[self.relation](self.measured, self.bound)

    def __str__(self) -> str:
        verdict = "holds" if self.holds else "FAILS"
        return f"  {verdict}  {self.description}: {self.measured:.4g} ({self.relation} {self.bound:.4g})"


def worst(
    name: str, description: str, values: Iterable[float], relation: str, bound: float, seeds: Sequence[int]
) -> Claim:
    """Return the claim about the value that is farthest off, and say of which seeds; a value or several for each."""
    choose, word = (max, "most") if relation == "<=" else (min, "least")
    return Claim(name, f"{description}, {word} of {seeds_text(seeds)}", choose(values), relation, bound)


def seeds_text(seeds: Sequence[int]) -> str:
    """Return ``seeds 0, 1, 2``."""
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def read_claim(saved: Any) -> Claim:
    """Return a claim from ``claims.json``, judged anew; ValueError, KeyError or TypeError if it is damaged."""
    words = str(saved["name"]), str(saved["description"])
    return Claim(*words, float(saved["measured"]), saved["relation"], float(saved["bound"]))
