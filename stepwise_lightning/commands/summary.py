"""``stepwise summary RUN …``."""

from __future__ import annotations

from stepwise_lightning.commands.parser import Parser

__all__ = ["main"]


def main(arguments: list[str]) -> None:
    """Print what finished runs have learned."""
    parser = Parser("summary", "Print what finished runs have learned, a row for each run and matrix: distinct steps, "
                    "modes learned, stepwiseness, times (learning rate × steps) of the first and the last step, "
                    "effective rank at the end. docs/glossary.md says what the words mean.")  # fmt: skip
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, runs/NAME/version_N")
    options = parser.parse_args(arguments)

    from stepwise_lightning.record import SpectrumRecord
    from stepwise_lightning.runs.report import COLUMNS, table

    rows = [COLUMNS, *table({run: SpectrumRecord.load(run) for run in options.runs})]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    for row in rows:
        texts = [text.ljust(width) if column < 2 else text.rjust(width)
                 for column, (text, width) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        print("  ".join(texts).rstrip())
