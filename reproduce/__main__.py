"""Run figures by name, or all of them: ``python -m reproduce linear_model --profile smoke``."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

from reproduce import (
    cross_loss_alignment,
    embedding_growth,
    hidden_spectra,
    kernel_mlp,
    kernel_pca,
    linear_model,
    resnet_barlow_twins,
    standard_init,
    three_losses,
)
from reproduce.common import check_writable, parser
from reproduce.report import write_report

# In the order of the paper; those that share their training runs follow each other.
FIGURES = {
    "linear_model": linear_model,
    "resnet_barlow_twins": resnet_barlow_twins,
    "three_losses": three_losses,
    "standard_init": standard_init,
    "hidden_spectra": hidden_spectra,
    "cross_loss_alignment": cross_loss_alignment,
    "embedding_growth": embedding_growth,
    "kernel_pca": kernel_pca,
    "kernel_mlp": kernel_mlp,
}
USAGE = """usage: python -m reproduce FIGURE [FIGURE ...] [options]
       python -m reproduce all [options]
       python -m reproduce list

One figure runs anew unless --resume is given. Several, and all, run what is missing, go on after a failure, and write
one page with every picture and verdict, <out>/report.html. Options: python -m reproduce FIGURE --help
To train the networks alone, on several machines at once: python -m reproduce.train --help

figures:
"""


def main(arguments: list[str]) -> int:
    """Run the named figures with the remaining arguments; return 0, 1 if a claim fails, 2 for errors."""
    names = []
    while arguments and not arguments[0].startswith("-"):
        names.append(arguments[0])
        arguments = arguments[1:]
    if names == ["list"] or (not names and arguments in ([], ["-h"], ["--help"])):
        print(USAGE + "\n".join(f"  {n:22}{(m.__doc__ or '').splitlines()[0]}" for n, m in FIGURES.items()))
        return 0
    choices = f"choose from: all, {', '.join(FIGURES)}"
    if not names:
        print(f"error: {arguments[0]!r} comes before the name of a figure; {choices}", file=sys.stderr)
        return 2
    names = list(FIGURES) if "all" in names else names
    if unknown := [name for name in names if name not in FIGURES]:
        print(f"error: unknown figure {unknown[0]!r}; {choices}", file=sys.stderr)
        return 2
    return FIGURES[names[0]].main(arguments) if len(names) == 1 else _several(names, arguments)


def _several(names: list[str], arguments: list[str]) -> int:
    """Run what is missing; after each figure the report is written, so that a killed run leaves one too."""
    figure_parser = parser("all", "Run several figures.", {"smoke": {}, "cpu": {}, "full": {}})
    out = figure_parser.parse_args(arguments).out  # refuses bad options once, not for every figure
    try:
        check_writable(Path(out))
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    status = 0
    for number, name in enumerate(names, 1):
        print(f"\n=== {number}/{len(names)}  {name}", flush=True)
        try:
            status = max(status, FIGURES[name].main([*arguments, "--resume"]))
        except Exception:  # one figure's bug must not cost the others
            traceback.print_exc()
            status = 2
        try:
            path = write_report(out, names)
        except OSError as error:
            print(f"error: the report cannot be written: {error}", file=sys.stderr)
            return 2
    print(f"\nreport       {path.resolve()}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
