"""What it takes to begin, by processor time, as ratios measured in one run.

1. Importing the theory, the losses and the spectra against importing torch, which they need (limit 1.3).
2. A run of two steps with the command line against importing Lightning alone (limit 2).
3. The same run in a process that is forked from a warm one, as ``python -m reproduce`` trains its networks, against one
   that was started anew (limit 0.6).

They alternate, and the median of the rounds' ratios is printed.
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
    """Train for two steps, and print the processor time of this process since it began."""
    from stepwise_lightning.__main__ import main as stepwise

    settings = {"max_steps": 2, "enable_progress_bar": "false", "logger.init_args.save_dir": folder}
    config = ROOT / "configs" / "barlow_twins_photos.yaml"
    sys.argv[1:] = ["fit", f"--config={config}", *(f"--trainer.{name}={value}" for name, value in settings.items())]
    stepwise()
    print(f"\n{time.process_time()}")


def anew(*command: str) -> float:
    """Return the processor time that Python takes, started anew, with this command line."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def imported(statement: str) -> float:
    """Return the processor time of a process that imports something."""
    return anew("-c", f"import time\n{statement}\nprint(time.process_time())")


def warm(folder: str) -> float:
    """Return the processor time of :func:`fit` in a process forked from a warm one."""
    sys.path.append(str(ROOT))
    from reproduce.processes import ForkedProcess

    log = Path(folder, "log.txt")
    with log.open("w") as file:
        status = ForkedProcess(Path(__file__).stem, ["--fit", folder], file).wait()
    if status:
        raise RuntimeError(log.read_text())
    return float(log.read_text().splitlines()[-1])


def main() -> int:
    """Print the ratios; return 1 if one is over its limit."""
    from timing import alternate, ratio, within

    with TemporaryDirectory() as folder:
        timed = {
            "torch": lambda: imported("import torch"),
            "theory": lambda: imported(THEORY),
            "Lightning": lambda: imported("import lightning"),
            "anew": lambda: anew(__file__, "--fit", folder),
            "warm": lambda: warm(folder),
        }
        seconds = alternate(timed, options.rounds)
    print("; ".join(f"{name} {min(values):.2f} s" for name, values in seconds.items()))
    ratios = {
        "importing theory, losses and spectra / importing torch": (ratio(seconds["theory"], seconds["torch"]), 1.3),
        "a run of two steps / importing Lightning": (ratio(seconds["anew"], seconds["Lightning"]), 2.0),
        "a run of two steps, forked / started anew": (ratio(seconds["warm"], seconds["anew"]), 0.6),
    }
    return 0 if all([within(name, value, limit) for name, (value, limit) in ratios.items()]) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often each is timed (default: 3)")
    parser.add_argument("--fit", metavar="FOLDER", help="train there for two steps: what this starts itself")
    options = parser.parse_args()
    sys.exit(fit(options.fit) if options.fit else main())
