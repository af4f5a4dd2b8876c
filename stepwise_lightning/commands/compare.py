"""``stepwise compare RUN [RUN …] [--band NAME] [--out FILE.png|pdf]``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stepwise_lightning.commands.parser import Parser, add_figure_file
from stepwise_lightning.commands.plot import named_runs, save_figure
from stepwise_lightning.commands.summary import print_table
from stepwise_lightning.errors import UserError

if TYPE_CHECKING:
    from stepwise_lightning.plots import ComparedRun
    from stepwise_lightning.spectrum import ReferenceBand
    from stepwise_lightning.spectrum.record import SpectrumRecord

_COLUMNS = ("run", "matrix", "mode", "step", "time / time of mode 1", "eigenvalue at the end")


def main(arguments: list[str]) -> None:
    """Print the modes of runs, aligned in time, and whether each run is inside the band of its configuration."""
    parser = Parser("compare", "Compare finished runs in units of the time of their first mode: print a table of their "
                    "modes and whether each run is like runs of its configuration with other seeds, and draw them in "
                    "one figure.")  # fmt: skip
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, runs/NAME/version_N")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--band", metavar="NAME",
                        help="configuration or file with a reference band (the NAME of each run)")  # fmt: skip
    choice.add_argument("--matrix", metavar="NAME", help="matrix (of the band, or the first of each run)")
    add_figure_file(parser, "compare.png")
    options = parser.parse_args(arguments)

    from stepwise_lightning.plots import comparison_figure
    from stepwise_lightning.spectrum.record import SpectrumRecord

    runs, rows, verdicts = [], [], []
    for name, folder in named_runs(options.runs).items():
        record, band = SpectrumRecord.load(folder), band_of(folder, options.band)
        try:
            run, modes, verdict = compared(name, record, band, options.matrix)
        except UserError as error:  # the other runs are compared
            verdicts.append(f"{name}: not comparable: {error}")
            continue
        runs.append(run)
        rows.extend(modes)
        verdicts.append(f"{name}: {verdict}")
    if not runs:
        raise UserError("; ".join(verdicts))
    print_table([_COLUMNS, *rows])
    print("", *verdicts, sep="\n")
    save_figure(comparison_figure(runs), options.out)


def compared(
    name: str, record: SpectrumRecord, band: ReferenceBand | None, matrix: str | None = None
) -> tuple[ComparedRun, list[tuple[str, ...]], str]:
    """Return a run, its rows of the table and the verdict; without the band if the band does not fit the run.

    Raises:
        ValueError: the matrix was measured less than twice.

    """
    from stepwise_lightning.plots import ComparedRun

    verdict = f"no reference band of {matrix}" if matrix else "no reference band"
    if band and matrix in (None, band.matrix):
        run = ComparedRun(name, record, band.matrix, band)
        try:
            return run, table(run), run.verdict
        except UserError as error:
            verdict, matrix = f"not comparable: {error}", band.matrix if band.matrix in record.matrices else None
    if not (matrix or record.matrices):
        raise UserError("no eigenvalues in this record: train again, with a lower learning rate if it diverged")
    run = ComparedRun(name, record, matrix or record.matrices[0])
    return run, table(run), verdict


def table(run: ComparedRun) -> list[tuple[str, ...]]:
    """Return a row of text for each mode that is learned at the end; a dash for the step of one that starts large."""
    times, ends = run.steps.step_times.numpy(), run.record.eigenvalues(run.matrix)[-1]
    steps = np.interp(times, run.record.times.numpy(), run.record.steps.numpy())
    rows: list[tuple[str, ...]] = []
    for mode in range(int(run.steps.num_learned[-1])):
        cells = (_number(steps[mode]), _number(times[mode] / times[0]), _number(float(ends[mode])))
        rows.append((run.name, run.matrix, str(mode + 1), *cells))
    return rows or [(run.name, run.matrix, "none", "–", "–", "–")]


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}" if math.isfinite(value) else "–"


def band_of(run: str, name: str | None) -> ReferenceBand | None:
    """Return the band of this name, or of the configuration NAME of a run, ``runs/NAME/version_N``."""
    from stepwise_lightning.spectrum import ReferenceBand

    if name is not None:
        return ReferenceBand.load(name)
    path = Path(run).resolve()
    name = (path if path.is_dir() else path.parent).parent.name
    return ReferenceBand.load(name) if name in ReferenceBand.names() else None
