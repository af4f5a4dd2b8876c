"""Processor time of start-up, as ratios measured in one run.

1. Importing the theory, the losses and the spectra, relative to importing torch, which they need (limit 1.3).
2. A run of two steps from the command line, relative to importing Lightning (limit 2).
3. The same run in a process forked after its imports, as ``python -m reproduce`` trains networks, relative to a new
   interpreter (limit 0.6).

Competitors alternate; the median ratio over rounds is printed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
THEORY = "from stepwise_lightning import barlow_twins_loss, simclr_loss, vicreg_loss, spectrum, theory"


def fit(folder: str) -> None:
    """Train for two steps and print the processor time of this process."""
    from stepwise_lightning.__main__ import main as stepwise

    settings = {"max_steps": 2, "enable_progress_bar": "false", "logger.init_args.save_dir": folder}
    config = ROOT / "configs" / "barlow_twins_photos.yaml"
    sys.argv[1:] = ["fit", f"--config={config}", *(f"--trainer.{name}={value}" for name, value in settings.items())]
    stepwise()
    print(f"\n{time.process_time()}")


def new_interpreter(*command: str) -> float:
    """Return the processor time that a new interpreter prints, for this command line."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def imported(statement: str) -> float:
    """Return the processor time of a new interpreter that runs this import."""
    return new_interpreter("-c", f"import time\n{statement}\nprint(time.process_time())")


def forked(folder: str) -> float:
    """Return the processor time of :func:`fit` in a process forked after its imports."""
    sys.path.append(str(ROOT))
    from reproduce.processes import ForkedProcess

    log = Path(folder, "log.txt")
    with log.open("w") as file:
        status = ForkedProcess(Path(__file__).stem, ["--fit", folder], file).wait()
    if status:
        raise RuntimeError(log.read_text())
    return float(log.read_text().splitlines()[-1])


def main() -> int:
    """Print the ratios; return 1 if one exceeds its limit."""
    from timing import alternate, check_all, ratio

    with TemporaryDirectory() as folder:
        timed = {
            "torch": lambda: imported("import torch"),
            "theory": lambda: imported(THEORY),
            "Lightning": lambda: imported("import lightning"),
            "new": lambda: new_interpreter(__file__, "--fit", folder),
            "forked": lambda: forked(folder),
        }
        seconds = alternate(timed, options.rounds)
    print("; ".join(f"{name} {min(values):.2f} s" for name, values in seconds.items()))
    ratios = {
        "importing theory, losses and spectra / importing torch": (ratio(seconds["theory"], seconds["torch"]), 1.3),
        "a run of two steps / importing Lightning": (ratio(seconds["new"], seconds["Lightning"]), 2.0),
        "a run of two steps, forked / new interpreter": (ratio(seconds["forked"], seconds["new"]), 0.6),
    }
    return 0 if check_all(ratios) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default: 3)")
    parser.add_argument("--fit", metavar="FOLDER", help="train for two steps in FOLDER (used internally)")
    options = parser.parse_args()
    sys.exit(fit(options.fit) if options.fit else main())
