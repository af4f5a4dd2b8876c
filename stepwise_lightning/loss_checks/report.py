"""Table of the results of :func:`stepwise_lightning.check_loss`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class ReportRow(NamedTuple):
    """One row of a :class:`LossReport`."""

    check: str
    result: str
    value: str
    remedy: str


@dataclass(frozen=True, repr=False)
class LossReport:
    """Results of :func:`stepwise_lightning.check_loss`; ``print`` shows a table."""

    rows: list[ReportRow]
    """Check, result, value and remedy of each row. Results are ``pass``; ``fail``, a fault; ``note``, a property that
    matters in some uses; and ``not checked``, with the reason as value."""

    @property
    def passed(self) -> bool:
        """True if no check failed."""
        return all(row.result != "fail" for row in self.rows)

    def __str__(self) -> str:
        table = [ReportRow._fields, *self.rows]
        widths = [max(len(row[column]) for row in table) for column in range(3)]
        lines = ([cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)] for row in table)
        return "\n".join(" | ".join(line).rstrip(" |") for line in lines)

    __repr__ = __str__
