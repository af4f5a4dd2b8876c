"""Barlow Twins, VICReg and SimCLR learn their embeddings one dimension at a time (main experiment of the paper).

Each loss trains a small ResNet from small and from ordinary initialisation, once per seed, with the shipped
configurations (``configs/<loss>_photos.yaml``, ``…_ordinary.yaml``) and the command line that anybody would use. The
steps are counted in ``spectrum.csv``: in the eigenvalues of C for Barlow Twins, which drives them from 0 to 1, of the
covariance for VICReg, and of the covariance of normalised embeddings for SimCLR, which sees no others.

The paper trains ResNet-50 on STL-10 with standard augmentations; learning rates and scales of the start are not stated
there. Ours: see the configurations.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from reproduce.common import Claim, data_name, print_table, report, write_outputs
from stepwise_lightning.images import load_image_set
from stepwise_lightning.plots import Trajectory, trajectories_figure
from stepwise_lightning.spectrum import Steps, detect_steps

CONFIGS = Path(__file__).parent.parent / "configs"
JUDGED = {"barlow_twins": "cross_correlation", "vicreg": "covariance", "simclr": "normalized_covariance"}
TITLES = {"barlow_twins": "Barlow Twins", "vicreg": "VICReg", "simclr": "SimCLR"}
EIGENVALUES = {"barlow_twins": "C", "vicreg": "covariance", "simclr": "normalised covariance"}
# How many distinct steps every seed must show; smoke is a size for tests, with four dimensions.
LEAST_STEPS = {
    "cpu": {"barlow_twins": 6, "vicreg": 4, "simclr": 4},
    "smoke": {"barlow_twins": 3, "vicreg": 2, "simclr": 2},
}
SMOKE_RATES = {"barlow_twins": 0.003, "vicreg": 0.001, "simclr": 0.0005}


@dataclass
class Run:
    """One training run, read back from its ``spectrum.csv``."""

    loss: str
    start: str
    seed: int
    logs: Path
    seconds: float = 0.0
    failure: str = ""

    @property
    def name(self) -> str:
        """What TensorBoard calls it."""
        return f"{self.loss}_{self.start}_seed{self.seed}"

    @property
    def directory(self) -> Path:
        """Where it writes."""
        return self.logs / self.name / "version_0"

    def read(self) -> None:
        """Read steps, times, losses and the judged eigenvalues, and find the steps."""
        with (self.directory / "spectrum.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        times = {int(row["step"]): float(row["time"]) for row in rows}
        losses = {int(row["step"]): float(row["value"]) for row in rows if row["quantity"] == "loss"}
        found = [row for row in rows if row["matrix"] == JUDGED[self.loss] and row["quantity"] == "eigenvalue"]
        self.steps = sorted(times)
        self.times = np.array([times[step] for step in self.steps])
        self.losses = np.array([losses.get(step, np.nan) for step in self.steps])
        self.eigenvalues = np.zeros((len(self.steps), 1 + max(int(row["mode"]) for row in found)))
        position = {step: index for index, step in enumerate(self.steps)}
        for row in found:
            self.eigenvalues[position[int(row["step"])], int(row["mode"])] = float(row["value"])
        self.found: Steps = detect_steps(torch.from_numpy(self.times), torch.from_numpy(self.eigenvalues))


def main(arguments: list[str] | None = None) -> int:
    """Run the experiment; return 0 if every claim holds, 1 if one fails, 2 for bad input."""
    options = _parser().parse_args(arguments)
    directory = Path(options.out) / "three_losses"
    logs = directory / "tensorboard"
    runs = [
        Run(loss, start, seed, logs) for seed in options.seeds for start in ("small", "ordinary") for loss in JUDGED
    ]
    try:
        if not CONFIGS.is_dir():
            raise FileNotFoundError(f"no configurations in {str(CONFIGS)!r}: run this from a clone of the repository")
        load_image_set(options.data, "val", options.root, options.download)  # refuses before anything is written
        started = time.perf_counter()
        _train_all(runs, options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for run in runs:
        run.read()
    first = [run for run in runs if run.seed == options.seeds[0]]
    figure = trajectories_figure(
        [_trajectory(run) for run in first if run.start == "small"],
        title="Three losses learn their embeddings one dimension at a time",
        note=f"a small ResNet on {data_name(options.data)}; seed {options.seeds[0]}; from ordinary initialisation: "
        + ", ".join(f"{run.found.num_distinct} ({TITLES[run.loss]})" for run in first if run.start == "ordinary")
        + " distinct steps",
        log_eigenvalues=True,
        same_axes=False,
    )
    claims, table = _claims(runs, LEAST_STEPS[options.profile]), [_summary(run) for run in runs]
    columns = ["loss", "start", "seed", "step", "time", "quantity", "mode", "value"]
    write_outputs(
        directory, figure, columns, (row for run in runs for row in _rows(run)), claims,
        name="three_losses", data_set=options.data, seeds=options.seeds, profile=options.profile, runs=table,
        seconds=round(time.perf_counter() - started, 1),
    )  # fmt: skip
    print_table(table)
    return report(directory, claims)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="three_losses", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", choices=LEAST_STEPS, default="cpu", help="size of the experiment (default: cpu)")
    parser.add_argument("--data", default="photos", help="photos, cifar10, stl10, or a folder (default: photos)")
    parser.add_argument("--out", default="results", help="folder for the outputs (default: results)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights and views (default: 0 1 2)")
    parser.add_argument("--resume", action="store_true", help="keep the runs that are finished")
    parser.add_argument("--root", default="data", help="where cifar10 and stl10 lie (default: data)")
    parser.add_argument("--download", action="store_true", help="fetch them if they are not there")
    return parser


def _train_all(runs: list[Run], options: argparse.Namespace) -> None:
    """Train as many at once as there are cores, on one thread each: two threads would gain little on so small a net."""
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=len(runs), desc="training", unit="run") as bar:
        for finished in [pool.submit(_train, run, options) for run in runs]:
            finished.add_done_callback(lambda _: bar.update())
        pool.shutdown()
    for run in runs:
        if run.failure:
            raise RuntimeError(f"{run.name} failed: {run.failure}")


def _train(run: Run, options: argparse.Namespace) -> None:
    if options.resume and (run.directory / "spectrum.npz").exists():
        return
    shutil.rmtree(run.directory.parent, ignore_errors=True)
    start = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(_command(run, options), capture_output=True, text=True, env=environment)
    run.seconds = time.perf_counter() - start
    if done.returncode:
        run.failure = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def _command(run: Run, options: argparse.Namespace) -> list[str]:
    config = CONFIGS / f"{run.loss}_photos{'_ordinary' if run.start == 'ordinary' else ''}.yaml"
    settings: dict[str, Any] = {
        "seed_everything": run.seed,
        "model.init_args.encoder.init_args.seed": run.seed,
        "data.init_args.seed": run.seed,
        "data.init_args.data": options.data,
        "data.init_args.root": options.root,
        "trainer.logger.init_args.save_dir": run.logs,
        "trainer.logger.init_args.name": run.name,
        "trainer.enable_progress_bar": "false",
    }
    if options.profile == "smoke":
        settings |= {
            "model.init_args.encoder.init_args.out_features": 4,
            "model.init_args.learning_rate": SMOKE_RATES[run.loss],
            "data.init_args.global_batch_size": 32,
            "data.init_args.num_probe_pairs": 64,
            "trainer.max_steps": 300,
        }
    command = [sys.executable, "-m", "stepwise_lightning", "fit", f"--config={config}"]
    return command + [f"--{name}={value}" for name, value in settings.items()]


def _claims(runs: list[Run], least: dict[str, int]) -> list[Claim]:
    claims = []
    for start in ("small", "ordinary"):
        for loss in JUDGED:
            counts = [run.found.num_distinct for run in runs if (run.loss, run.start) == (loss, start)]
            what = f"{TITLES[loss]}: distinct steps from {start} initialisation, {', '.join(map(str, counts))} by seed"
            if start == "small":
                claims.append(Claim(f"{loss}_steps", f"{what}; fewest", min(counts), ">=", least[loss]))
            else:
                claims.append(Claim(f"{loss}_control", f"{what}; most", max(counts), "<=", 1))
    return claims


def _trajectory(run: Run) -> Trajectory:
    count = run.found.num_distinct
    return Trajectory(
        title=f"{TITLES[run.loss]}: {count} distinct step{'s' * (count != 1)}",
        times=run.times,
        losses=run.losses,
        eigenvalues=run.eigenvalues,
        step_times=run.found.step_times.numpy(),
        eigenvalues_label=f"eigenvalues, {EIGENVALUES[run.loss]}",
    )


def _summary(run: Run) -> dict[str, Any]:
    return {
        "loss": run.loss,
        "start": run.start,
        "seed": run.seed,
        "modes_learned": int(run.found.num_learned[-1]),
        "distinct_steps": run.found.num_distinct,
        "stepwiseness": round(run.found.stepwiseness, 2),
        "training_steps": run.steps[-1],
        "seconds": round(run.seconds) or None,
    }


def _rows(run: Run) -> list[list[Any]]:
    rows: list[list[Any]] = []
    for index, step in enumerate(run.steps):
        head = [run.loss, run.start, run.seed, step, run.times[index]]
        rows.append([*head, "loss", "", run.losses[index]])
        rows += [[*head, "eigenvalue", mode, value] for mode, value in enumerate(run.eigenvalues[index])]
    return rows


if __name__ == "__main__":
    sys.exit(main())
