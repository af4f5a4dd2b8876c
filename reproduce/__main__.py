"""Run one figure, several or all: ``python -m reproduce linear_model --profile smoke``."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

from reproduce.confirm import confirm
from reproduce.figure import run_figure
from reproduce.figures import FIGURES, LONG, train_networks
from reproduce.networks.training import PROFILES
from reproduce.options import check_writable, exit_interrupted, new_parser, report_error
from reproduce.processes import prepare_process
from reproduce.report import verdict_table, write_report
from stepwise_lightning.commands.reporting import prepare_output

USAGE = """usage: python -m reproduce FIGURE [FIGURE ...] [options]
       python -m reproduce all [options]      all figures except the long ones
       python -m reproduce confirm [options]  the primary claims of protocol.json with new seeds; takes hours
       python -m reproduce list

A single figure is recomputed unless --resume is given. Several figures, or all, are computed only if they are missing;
the command continues after a failure and writes one page with all figures and verdicts, <out>/report.html.
Options: python -m reproduce FIGURE --help
Train networks only, in parallel on several machines: python -m reproduce.train --help

figures:
"""


def main(arguments: list[str]) -> int:
    """Run the named figures; return 0, 1 if a claim fails, or 2 for errors."""
    names = []
    while arguments and not arguments[0].startswith("-"):
        names.append(arguments[0])
        arguments = arguments[1:]
    if names == ["confirm"]:
        return confirm(arguments)
    if names == ["list"] or (not names and arguments in ([], ["-h"], ["--help"])):
        lines = (f"  {name:22}{figure.title}{' (long)' * (name in LONG)}" for name, figure in FIGURES.items())
        print(USAGE + "\n".join(lines))
        return 0
    choices = f"choose from: all, {', '.join(FIGURES)}"
    if not names:
        print(f"error: {arguments[0]!r} comes before the name of a figure; {choices}", file=sys.stderr)
        return 2
    names = [name for name in FIGURES if name not in LONG] if "all" in names else names
    if unknown := [name for name in names if name not in FIGURES]:
        print(f"error: unknown figure {unknown[0]!r}; {choices}", file=sys.stderr)
        return 2
    return run_figure(FIGURES[names[0]], arguments) if len(names) == 1 else _run_several(names, arguments)


def _run_several(names: list[str], arguments: list[str]) -> int:
    """Run several figures, and update the report after each."""
    # Parse once here: invalid options are reported once, not for every figure.
    out = new_parser("reproduce all", "Run several figures.", PROFILES).parse_args(arguments).out
    try:
        check_writable(Path(out))
        missing = [name for name in names if not (Path(out) / name / "claims.json").exists()]
    except Exception as error:
        return report_error(error)
    prepare_process()
    try:
        train_networks(missing, arguments)
    except Exception:  # each figure reports it
        pass
    except KeyboardInterrupt:
        exit_interrupted()
    status = 0
    for number, name in enumerate(names, 1):
        print(f"\n=== {number}/{len(names)}  {name}", flush=True)
        try:
            status = max(status, run_figure(FIGURES[name], [*arguments, "--resume"]))
        except Exception:  # a bug in one figure must not stop the others
            traceback.print_exc()
            status = 2
        try:
            path = write_report(out, names)
        except Exception as error:
            return report_error(error)
    print(f"\n{verdict_table(out, names)}\n\nreport       {path.resolve()}")
    return status


if __name__ == "__main__":
    prepare_output()
    sys.exit(main(sys.argv[1:]))
