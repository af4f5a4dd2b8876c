"""``stepwise summary RUN …``."""

from __future__ import annotations

import math

from stepwise_lightning.commands.parser import Parser
from stepwise_lightning.spectrum.record import SpectrumRecord

__all__ = ["main", "table"]

COLUMNS = ("run", "matrix", "distinct steps", "modes learned", "stepwiseness", "first step", "last step", "rank")


def main(arguments: list[str]) -> None:
    """Print what finished runs have learned."""
    parser = Parser("summary", "Print what finished runs have learned, a row for each run and matrix: distinct steps, "
                    "modes learned, stepwiseness, times (learning rate × steps) of the first and the last step, "
                    "effective rank at the end. docs/glossary.md says what the words mean.")  # fmt: skip
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, runs/NAME/version_N")
    options = parser.parse_args(arguments)

    rows = [COLUMNS, *table({run: SpectrumRecord.load(run) for run in options.runs})]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    for row in rows:
        texts = [text.ljust(width) if column < 2 else text.rjust(width)
                 for column, (text, width) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        print("  ".join(texts).rstrip())


def table(records: dict[str, SpectrumRecord]) -> list[tuple[str, ...]]:
    """Return what runs have learned, as rows of text under ``COLUMNS``: one for each run and matrix.

    Times are learning rate × steps; the rank is the effective one at the end. A dash stands for what is not defined.
    """
    rows: list[tuple[str, ...]] = []
    for run, record in records.items():
        for matrix in record.matrices:
            rank = float(record.measure("effective_rank", matrix)[-1]) if _has_rank(record, matrix) else math.nan
            try:
                steps = record.detect_steps(matrix)
            except ValueError:
                rows.append((run, matrix, "–", "–", "–", "–", "–", _number(rank)))
                continue
            times = [time for time in steps.step_times.tolist() if math.isfinite(time)]
            learned = f"{int(steps.num_learned[-1])} of {len(steps.step_times)}"
            ends = [_number(times[index]) if times else "–" for index in (0, -1)]
            rows.append(
                (run, matrix, str(steps.num_distinct), learned, f"{steps.stepwiseness:.2g}", *ends, _number(rank))
            )
    return rows


def _has_rank(record: SpectrumRecord, matrix: str) -> bool:
    return "effective_rank" in record.measures(matrix)


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "–"
