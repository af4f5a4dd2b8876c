"""``stepwise compare RUN [RUN …] [--band NAME] [--out FILE.png|pdf]``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stepwise_lightning.commands.parser import Parser, add_figure_file
from stepwise_lightning.commands.plot import named_runs, save_figure
from stepwise_lightning.commands.summary import print_table

if TYPE_CHECKING:
    from stepwise_lightning.plots import ComparedRun
    from stepwise_lightning.spectrum import ReferenceBand

_COLUMNS = ("run", "matrix", "mode", "step", "time / time of mode 1", "eigenvalue at the end")


def main(arguments: list[str]) -> None:
    """Print the modes of runs, aligned in time, and whether each run is inside the band of its configuration."""
    parser = Parser("compare", "Compare finished runs in units of the time of their first mode: print a table of their "
                    "modes and whether each run is like runs of its configuration with other seeds, and draw them in "
                    "one figure.")  # fmt: skip
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, runs/NAME/version_N")
    parser.add_argument("--band", metavar="NAME",
                        help="configuration or file with a reference band (the NAME of each run)")  # fmt: skip
    parser.add_argument("--matrix", metavar="NAME", help="matrix of runs without a band (the first of each run)")
    add_figure_file(parser, "compare.png")
    options = parser.parse_args(arguments)

    from stepwise_lightning.plots import ComparedRun, comparison_figure
    from stepwise_lightning.spectrum.record import SpectrumRecord

    runs = []
    for name, folder in named_runs(options.runs).items():
        record, band = SpectrumRecord.load(folder), band_of(folder, options.band)
        runs.append(ComparedRun(name, record, band.matrix if band else options.matrix or record.matrices[0], band))
    print_table([_COLUMNS, *(row for run in runs for row in table(run))])
    print()
    for run in runs:
        print(f"{run.name}: {run.verdict}")
    save_figure(comparison_figure(runs), options.out)


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
    """Return the band of this name, or of the configuration in the path of a run, ``runs/NAME/version_N``."""
    from stepwise_lightning.spectrum import ReferenceBand

    if name is not None:
        return ReferenceBand.load(name)
    known = [part for part in Path(run).resolve().parts if part in ReferenceBand.names()]
    return ReferenceBand.load(known[-1]) if known else None
