"""Overhead of the linear experiment, as ratios measured in one run: ``make benchmark``.

1. A Lightning training step relative to a plain PyTorch loop with the same module, loss, optimiser and batch (limit 3).
2. The closed form at every logged step relative to the training that it predicts (limit 1/100).

Plain and Lightning runs alternate, and medians over rounds are compared, which cancels drift of the machine.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from tempfile import TemporaryDirectory

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from timing import Stopwatch, alternate, argument_parser, check_all, machine, quiet_lightning

from stepwise_lightning import BarlowTwins, FixedCropPairs, LinearEncoder, SpectrumLogger
from stepwise_lightning.theory import LinearBarlowTwins, feature_cross_correlation

STEPS = 24_000  # approximate length of the cpu profile on photographs, to which training time is scaled


def new_module(rate: float) -> BarlowTwins:
    """Return the linear model of the linear figure."""
    return BarlowTwins(LinearEncoder(1200, 10, 1e-3), rate, off_diagonal_weight=1.0, normalize=False)


def plain_loop(pairs: FixedCropPairs, rate: float, steps: int) -> float:
    """Return seconds for ``steps`` steps of a plain PyTorch loop."""
    module = new_module(rate)
    optimizer = module.configure_optimizers()
    start = time.perf_counter()
    for _ in range(steps):
        loss = module.loss(module(pairs.x1), module(pairs.x2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return time.perf_counter() - start


def lightning_run(pairs: FixedCropPairs, rate: float, steps: int, as_figure: bool) -> float:
    """Return seconds for ``steps`` steps with a Trainer, alone or with the logging of the figure script."""
    watch = Stopwatch()
    pairs.hparams["steps_per_epoch"] = steps
    with TemporaryDirectory() as directory:
        extras = [SpectrumLogger(num_points=round(300 * steps / STEPS) + 2), TQDMProgressBar(max(1, steps // 50))]
        trainer = L.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=TensorBoardLogger(directory) if as_figure else False,
            callbacks=[watch, *(extras if as_figure else [])],
            enable_progress_bar=as_figure,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        trainer.fit(new_module(rate), datamodule=pairs)
    return watch.seconds


def closed_form(theory: LinearBarlowTwins) -> float:
    """Return seconds to evaluate the uniform approximation at 300 times."""
    assert theory.learning_rate is not None
    times = theory.learning_rate * torch.logspace(0, 4.38, 300, dtype=torch.float64).round()
    start = time.perf_counter()
    theory.embedding_eigenvalues(times)
    return time.perf_counter() - start


def main() -> int:
    """Print the ratios; return 1 if one exceeds its limit."""
    parser = argument_parser(__doc__, rounds=5)
    parser.add_argument("--steps", type=int, default=1000, help="training steps per round (default: 1000)")
    options = parser.parse_args()
    quiet_lightning()
    torch.set_num_threads(1)  # like the figure script
    ok = True
    print(f"{machine()}; medians of rounds")
    for num_pairs in (250, 500):
        pairs = FixedCropPairs(num_pairs=num_pairs)
        pairs.setup()
        gamma = feature_cross_correlation(pairs.x1, pairs.x2)
        rate = 0.1 / (4 * float(torch.linalg.eigvalsh(gamma)[-1]))
        theory = LinearBarlowTwins(gamma, LinearEncoder(1200, 10, 1e-3).weight.detach(), rate)
        timed: dict[str, Callable[[], float]] = {
            "plain": lambda p=pairs, r=rate: plain_loop(p, r, options.steps),
            "trainer": lambda p=pairs, r=rate: lightning_run(p, r, options.steps, as_figure=False),
            "figure": lambda p=pairs, r=rate: lightning_run(p, r, options.steps, as_figure=True),
            "theory": lambda t=theory: closed_form(t),
        }
        seconds = {name: statistics.median(values) for name, values in alternate(timed, options.rounds).items()}
        training = seconds["figure"] / options.steps * STEPS
        ratios = {
            "Lightning step / plain step": (seconds["trainer"] / seconds["plain"], 3),
            "Lightning step with spectra, TensorBoard, progress bar / plain step": (
                seconds["figure"] / seconds["plain"],
                3,
            ),
            f"closed form at 300 times / training of {STEPS} steps": (seconds["theory"] / training, 0.01),
        }
        print(f"\n{num_pairs} pairs of 20×20 crops; plain step {1e3 * seconds['plain'] / options.steps:.2f} ms")
        ok &= check_all(ratios)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
