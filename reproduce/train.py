"""Train the networks of one loss as the figures do, and draw nothing: ``python -m reproduce.train vicreg small``.

For clusters, where runs are trained side by side, each by a job of its own, before all figures are drawn from them with
``python -m reproduce all --resume`` and the same options. See ``docs/clusters.md``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from reproduce.networks.runs import trained_runs
from reproduce.networks.training import MIDDLE, PROFILES
from reproduce.networks.variants import METHODS, VARIANTS
from reproduce.options import check_writable, interrupted, new_parser, parse, refusal


def main(arguments: list[str] | None = None) -> int:
    """Train what is asked for; return 0, or 2 for bad input or a failed run."""
    parser = new_parser("reproduce.train", __doc__, PROFILES | MIDDLE)
    parser.add_argument("loss", choices=METHODS)
    parser.add_argument("variant", choices=VARIANTS, help="by what it differs from its configuration; small: nothing")
    options = parse(parser, PROFILES | MIDDLE, arguments)
    try:
        check_writable(Path(options.out) / "runs")
        runs = trained_runs(options, [(options.loss, options.variant)])
    except Exception as error:
        return refusal(error)
    except KeyboardInterrupt:
        interrupted()
    for run in runs:
        print(f"{run.name}: {run.directory.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
