"""``stepwise summary RUN …``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from stepwise_lightning.commands.parser import Parser

if TYPE_CHECKING:
    from stepwise_lightning.spectrum.record import SpectrumRecord

COLUMNS = (
    "run", "matrix", "distinct steps", "plateaus", "modes learned", "stepwiseness", "first step", "last step", "rank"
)  # fmt: skip


def main(arguments: list[str]) -> None:
    """Print a table of the modes that finished runs have learned."""
    parser = Parser("summary", "Print a table of finished runs, with a row for each run and matrix: distinct steps, "
                    "plateaus, modes learned, stepwiseness, times (learning rate × steps) of the first and the last "
                    "step, final effective rank. docs/glossary.md defines the terms.")  # fmt: skip
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, runs/NAME/version_N")
    options = parser.parse_args(arguments)

    from stepwise_lightning.spectrum.record import SpectrumRecord

    print_table([COLUMNS, *table({run: SpectrumRecord.load(run) for run in options.runs})])


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Print rows of text: two columns aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        texts = [text.ljust(width) if column < 2 else text.rjust(width)
                 for column, (text, width) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        print("  ".join(texts).rstrip())


def table(records: dict[str, SpectrumRecord]) -> list[tuple[str, ...]]:
    """Return rows of text with the columns ``COLUMNS``, one row for each run and matrix.

    Times are learning rate × steps; the rank is the final effective rank. Undefined values are shown as a dash.
    """
    rows: list[tuple[str, ...]] = []
    for run, record in records.items():
        for matrix in record.matrices:
            rank = float(record.measure("effective_rank", matrix)[-1]) if _has_rank(record, matrix) else math.nan
            try:
                steps = record.detect_steps(matrix)
            except ValueError:
                rows.append((run, matrix, *["–"] * 6, _number(rank)))
                continue
            times = [time for time in steps.step_times.tolist() if math.isfinite(time)]
            learned = f"{int(steps.num_learned[-1])} of {len(steps.step_times)}"
            ends = [_number(times[index]) if times else "–" for index in (0, -1)]
            counts = str(steps.num_distinct), str(steps.num_plateaus), learned
            rows.append((run, matrix, *counts, f"{steps.stepwiseness:.2g}", *ends, _number(rank)))
    return rows


def _has_rank(record: SpectrumRecord, matrix: str) -> bool:
    return "effective_rank" in record.measures(matrix)


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "–"
