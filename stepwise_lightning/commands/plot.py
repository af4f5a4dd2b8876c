"""``stepwise plot RUN [RUN …] [--out FILE.png|pdf]``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from stepwise_lightning.commands.parser import Parser, add_figure_file

if TYPE_CHECKING:
    from stepwise_lightning.plots.panels import Figure


def main(arguments: list[str]) -> None:
    """Plot one run, or several in one figure."""
    parser = Parser("plot", "Plot the loss and eigenvalues of a finished run against time (learning rate × steps), or "
                    "of several runs in one figure.")  # fmt: skip
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, runs/NAME/version_N")
    add_figure_file(parser, "trajectories.png")
    parser.add_argument("--matrix", nargs="+", metavar="NAME",
                        help="matrices to plot, such as covariance (all of the embedding)")  # fmt: skip
    options = parser.parse_args(arguments)

    from stepwise_lightning.plots import overlay_figure, run_figure
    from stepwise_lightning.spectrum.record import SpectrumRecord

    runs = {
        name.replace("$", r"\$"): SpectrumRecord.load(run)  # $ begins a formula
        for name, run in named_runs(options.runs).items()
    }
    if len(runs) == 1:
        ((name, record),) = runs.items()
        figure = run_figure(record, name, options.matrix)
    else:
        figure = overlay_figure(runs, "", options.matrix)
    save_figure(figure, options.out)


def save_figure(figure: Figure, out: Path) -> None:
    """Write a figure, and print the path."""
    import matplotlib

    from stepwise_lightning.files import atomic_write

    with matplotlib.rc_context({"pdf.fonttype": 42}):  # embed text as text
        atomic_write(out, lambda partial: figure.savefig(partial, dpi=130))
    print(out)


def named_runs(runs: list[str]) -> dict[str, str]:
    """Return runs by short names: their paths without common parent folders."""
    paths = list(dict.fromkeys(map(Path, runs)))
    if len(paths) == 1:
        return {"/".join(paths[0].parts[-2:]): runs[0]}
    parts, start = [path.parts for path in paths], 0
    while all(len(part) > start + 1 and part[start] == parts[0][start] for part in parts):
        start += 1
    return {"/".join(part[start:]): str(path) for part, path in zip(parts, paths, strict=True)}
