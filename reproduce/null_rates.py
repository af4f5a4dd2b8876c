"""False-positive rates of the step detectors: ``python -m reproduce.null_rates`` prints the table of the glossary.

Each null has eight eigenvalues, 1 to 0.13, at 70 times. *White*, *AR(1)* (coefficient 0.9) and *random walk* are
constants with relative noise; the standard deviation of the walk at the end is that of the other two. *Together*: all
modes grow at one rate from starts with a standard deviation of one e-fold, and saturate at 1, with white noise. *One
rate*: the same without noise, with starts two decades apart; its steps are real, but not of eigenmodes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stepwise_lightning import SpectrumRecord
from stepwise_lightning.spectrum import Rises, Steps, detect_rises, detect_steps, num_grown
from stepwise_lightning.spectrum.collapses import find_collapse

SAMPLES, MODES, RUNS = 70, 8, 300
TIMES = torch.arange(SAMPLES, dtype=torch.float64)
STATIONARY = ("white", "AR(1)", "random walk")
DETECTORS: dict[str, Callable[[Steps, Rises, Tensor], bool]] = {
    "two distinct steps": lambda steps, rises, values: steps.num_distinct > 1,
    "two plateaus": lambda steps, rises, values: steps.num_plateaus > 1,
    "a grown mode": lambda steps, rises, values: num_grown(values[0], values[-1]) > 0,
    "two modes apart": lambda steps, rises, values: rises.num_apart > 1,
    "separation ≥ 1": lambda steps, rises, values: rises.separation >= 1,
    "collapse": lambda steps, rises, values: bool(
        find_collapse(SpectrumRecord.of(TIMES, values, steps=6 * TIMES.long())).kind
    ),
}


def null_runs(kind: str, noise: float, runs: int = RUNS, seed: int = 0) -> Tensor:
    """Return eigenvalues of a null, (runs, T, d), descending."""
    generator = torch.Generator().manual_seed(seed)
    e = torch.randn(runs, 2 * SAMPLES, MODES, dtype=torch.float64, generator=generator)
    if kind == "AR(1)":
        for step in range(1, 2 * SAMPLES):
            e[:, step] = 0.9 * e[:, step - 1] + 0.19**0.5 * e[:, step]
    relative = 1 + noise * (e[:, :SAMPLES].cumsum(1) / SAMPLES**0.5 if kind == "random walk" else e[:, SAMPLES:])
    if kind in STATIONARY:
        values = torch.logspace(0, -0.9, MODES, dtype=torch.float64) * relative
    elif kind == "together":
        values = torch.sigmoid(TIMES[:, None] - 20 + e[:, :1]) * relative
    else:
        values = torch.sigmoid(2 * TIMES[:, None] - 20 - 2 * torch.arange(MODES) * 10.0**0.5).expand(runs, -1, -1)
    return values.sort(-1, descending=True).values


def false_positive_rates(kind: str, noise: float, runs: int = RUNS) -> dict[str, float]:
    """Return the share of runs in which each detector finds something, and of means of three separations ≥ 1."""
    found = [
        (detect_steps(TIMES, values), detect_rises(TIMES, values), values) for values in null_runs(kind, noise, runs)
    ]
    rates = {name: sum(detector(*each) for each in found) / runs for name, detector in DETECTORS.items()}
    separations = torch.tensor([rises.separation for _, rises, _ in found]).view(-1, 3).mean(1)
    return rates | {"mean of three separations ≥ 1": float((separations >= 1).double().mean())}


def main() -> None:
    """Print a Markdown table."""
    nulls = [(kind, noise) for kind in STATIONARY for noise in (0.05, 0.1, 0.2)] + [("together", 0.1), ("one rate", 0)]
    rows = {f"{kind}, {noise:.0%}": false_positive_rates(kind, noise) for kind, noise in nulls}
    names = list(rows["white, 5%"])
    print("| null, noise |", " | ".join(names), "|")
    print("|---" * (len(names) + 1) + "|")
    for null, rates in rows.items():
        print(f"| {null} |", " | ".join(f"{rates[name]:.1%}" for name in names), "|")


if __name__ == "__main__":
    main()
