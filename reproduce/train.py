"""Train the networks of one loss as the figures do, and draw nothing: ``python -m reproduce.train vicreg small``.

For clusters, where runs are trained side by side, each by a job of its own, before all figures are drawn from them with
``python -m reproduce all --resume`` and the same options. See ``docs/clusters.md``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from reproduce.common import check_writable, interrupted, parser
from reproduce.runs import LOSSES, trained_runs
from reproduce.standard_init import STARTS
from reproduce.training import PROFILES


def main(arguments: list[str] | None = None) -> int:
    """Train what is asked for; return 0, or 2 for bad input or a failed run."""
    train_parser = parser("train", __doc__, PROFILES)
    train_parser.prog = "python -m reproduce.train"
    train_parser.add_argument("loss", choices=LOSSES)
    train_parser.add_argument("start", choices=STARTS, help="the initialisation")
    options = train_parser.parse_args(arguments)
    options.data = options.data or PROFILES[options.profile].get("data", "photos")
    try:
        check_writable(Path(options.out) / "runs")
        runs = trained_runs(options, (options.loss,), (options.start,))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        interrupted()
    for run in runs:
        print(f"{run.name}: {run.directory.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
