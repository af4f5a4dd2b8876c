"""What the linear experiment costs beyond its arithmetic, as ratios measured in one run: ``make benchmark``.

1. A Lightning training step against a bare PyTorch loop with the same module, loss, optimiser and batch (limit 3).
2. The closed form at every logged step against the training it predicts (limit 1/100).

Bare and Lightning runs alternate, and the median over the rounds is compared, so that drift of the machine cancels.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from tempfile import TemporaryDirectory

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from timing import Stopwatch, alternate, quiet_lightning, within

from stepwise_lightning import BarlowTwins, FixedCropPairs, LinearEncoder, SpectrumLogger
from stepwise_lightning.theory import LinearBarlowTwins, feature_cross_correlation

STEPS = 24_000  # about the length of the cpu profile on photographs; training time is scaled to it


def new_module(rate: float) -> BarlowTwins:
    """Return the analytical model of the linear figure."""
    return BarlowTwins(LinearEncoder(1200, 10, 1e-3), rate, off_diagonal_weight=1.0, normalize=False)


def bare_loop(pairs: FixedCropPairs, rate: float, steps: int) -> float:
    """Return seconds for ``steps`` steps of a plain loop."""
    module = new_module(rate)
    optimizer = module.configure_optimizers()
    start = time.perf_counter()
    for _ in range(steps):
        loss = module.loss(module(pairs.x1), module(pairs.x2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return time.perf_counter() - start


def lightning_run(pairs: FixedCropPairs, rate: float, steps: int, everything: bool) -> float:
    """Return seconds for ``steps`` steps through a Trainer, alone or as the figure script runs it."""
    watch = Stopwatch()
    pairs.hparams["steps_per_epoch"] = steps
    with TemporaryDirectory() as directory:
        extras = [SpectrumLogger(num_points=round(300 * steps / STEPS) + 2), TQDMProgressBar(max(1, steps // 50))]
        trainer = L.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=TensorBoardLogger(directory) if everything else False,
            callbacks=[watch, *(extras if everything else [])],
            enable_progress_bar=everything,
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        trainer.fit(new_module(rate), datamodule=pairs)
    return watch.seconds


def closed_form(theory: LinearBarlowTwins) -> float:
    """Return seconds for evaluating the uniform form at 300 times."""
    assert theory.learning_rate is not None
    times = theory.learning_rate * torch.logspace(0, 4.38, 300, dtype=torch.float64).round()
    start = time.perf_counter()
    theory.embedding_eigenvalues(times)
    return time.perf_counter() - start


def main() -> int:
    """Print the ratios; return 1 if one is over its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often each is timed (default: 5)")
    parser.add_argument("--steps", type=int, default=1000, help="training steps a round (default: 1000)")
    options = parser.parse_args()
    quiet_lightning()
    torch.set_num_threads(1)  # as the figure script does
    ok = True
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; medians of rounds")
    for num_pairs in (250, 500):
        pairs = FixedCropPairs(num_pairs=num_pairs)
        pairs.setup()
        gamma = feature_cross_correlation(pairs.x1, pairs.x2)
        rate = 0.1 / (4 * float(torch.linalg.eigvalsh(gamma)[-1]))
        theory = LinearBarlowTwins(gamma, LinearEncoder(1200, 10, 1e-3).weight.detach(), rate)
        timed: dict[str, Callable[[], float]] = {
            "bare": lambda p=pairs, r=rate: bare_loop(p, r, options.steps),
            "trainer": lambda p=pairs, r=rate: lightning_run(p, r, options.steps, everything=False),
            "figure": lambda p=pairs, r=rate: lightning_run(p, r, options.steps, everything=True),
            "theory": lambda t=theory: closed_form(t),
        }
        seconds = {name: statistics.median(values) for name, values in alternate(timed, options.rounds).items()}
        training = seconds["figure"] / options.steps * STEPS
        ratios = {
            "Lightning step / bare step": (seconds["trainer"] / seconds["bare"], 3),
            "same with spectra, TensorBoard, progress bar": (seconds["figure"] / seconds["bare"], 3),
            f"closed form at 300 times / training of {STEPS} steps": (seconds["theory"] / training, 0.01),
        }
        print(f"\n{num_pairs} pairs of 20×20 crops; bare step {1e3 * seconds['bare'] / options.steps:.2f} ms")
        ok &= all([within(name, ratio, limit) for name, (ratio, limit) in ratios.items()])
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
