"""Train the networks of one loss without drawing a figure: ``python -m reproduce.train vicreg small``.

Use it on a cluster to train runs in parallel, one per job. Then draw all figures from these runs with ``python -m
reproduce all --resume`` and the same options. See ``docs/clusters.md``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from reproduce.networks.runs import trained_runs
from reproduce.networks.training import MIDDLE_PROFILES, PROFILES
from reproduce.networks.variants import ALL_LOSS_SETTINGS, VARIANTS
from reproduce.options import check_writable, exit_interrupted, new_parser, parse, report_error
from stepwise_lightning.commands.reporting import prepare_output


def main(arguments: list[str] | None = None) -> int:
    """Train the requested runs; return 0, or 2 for bad input or a failed run."""
    profiles = PROFILES | MIDDLE_PROFILES
    parser = new_parser("reproduce.train", __doc__, profiles)
    parser.add_argument("loss", choices=ALL_LOSS_SETTINGS)
    parser.add_argument("variant", choices=VARIANTS, help="difference from the configuration file; small: none")
    options = parse(parser, profiles, arguments)
    try:
        check_writable(Path(options.out) / "runs")
        runs = trained_runs(options, [(options.loss, options.variant)])
    except Exception as error:
        return report_error(error)
    except KeyboardInterrupt:
        exit_interrupted()
    for run in runs:
        print(f"{run.name}: {run.directory.resolve()}")
    return 0


if __name__ == "__main__":
    prepare_output()
    sys.exit(main())
