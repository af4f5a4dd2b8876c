"""``stepwise plot RUN [RUN …] [--out FILE.png|pdf]``."""

from __future__ import annotations

from pathlib import Path

from stepwise_lightning.commands.parser import Parser

_ENDINGS = (".png", ".pdf", ".svg")


def main(arguments: list[str]) -> None:
    """Plot one run, or several in one figure."""
    parser = Parser("plot", "Plot the loss and eigenvalues of a finished run against time (learning rate × steps), or "
                    "of several runs in one figure.")  # fmt: skip
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs, runs/NAME/version_N")
    parser.add_argument("--out", type=Path, default=Path("trajectories.png"), metavar="FILE",
                        help=f"file to write, ending in {', '.join(_ENDINGS)} (%(default)s)")  # fmt: skip
    parser.add_argument("--matrix", nargs="+", metavar="NAME",
                        help="matrices to plot, such as covariance (all of the embedding)")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.out.suffix not in _ENDINGS:
        parser.error(f"--out {options.out} must end in one of {', '.join(_ENDINGS)}")

    import matplotlib

    from stepwise_lightning.files import atomic_write
    from stepwise_lightning.plots import overlay_figure, run_figure
    from stepwise_lightning.spectrum.record import SpectrumRecord

    names = [name.replace("$", r"\$") for name in _names(options.runs)]  # $ begins a formula
    runs = dict(zip(names, map(SpectrumRecord.load, options.runs), strict=True))
    if len(runs) == 1:
        ((name, record),) = runs.items()
        figure = run_figure(record, name, options.matrix)
    else:
        figure = overlay_figure(runs, "", options.matrix)
    with matplotlib.rc_context({"pdf.fonttype": 42}):  # embed text as text
        atomic_write(options.out, lambda partial: figure.savefig(partial, dpi=130))
    print(options.out)


def _names(runs: list[str]) -> list[str]:
    """Return short names of runs: their paths without common parent folders."""
    parts = [Path(run).parts for run in dict.fromkeys(runs)]
    if len(parts) == 1:
        return ["/".join(parts[0][-2:])]
    start = 0
    while all(len(part) > start + 1 and part[start] == parts[0][start] for part in parts):
        start += 1
    return ["/".join(part[start:]) for part in parts]
