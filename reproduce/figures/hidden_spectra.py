"""The hidden representation grows in the same steps as the embedding (appendix of the paper).

The losses depend on the embedding only. The figure compares its eigenvalues with the eigenvalues of the representation
before the projector, on the same held-out pairs, for the runs of ``three_losses``. The hidden eigenvalues are large at
initialisation and do not grow by many orders of magnitude. When the embedding learns its k-th mode, the k-th hidden
eigenvalue rises too; the hidden eigenvalues of other modes do not.

For Barlow Twins and VICReg each hidden eigenvalue rises closer to its own step than to a common time of all steps, and
than to times in the same order that are evenly spaced, in their logarithm, from the first step to the last. For SimCLR
this does not hold (photographs, seeds 0, 1, 2: 0.70, 1.03 and 1.21 times the distance from a common time), and there is
no claim.

Order and spacing may be similar in all networks, so ``lateness`` in ``claims.json`` compares each network with its own
steps and with those of the other seeds: with VICReg a mode that the embedding learns later than the regression of its
network, the hidden representation learns later too; with Barlow Twins the steps of another network explain as much.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import numpy as np

from reproduce.claims import Claim, average, worst
from reproduce.figure import Outcome, PaperFigure
from reproduce.networks.runs import ROW_COLUMNS, Run, trained_runs
from reproduce.networks.training import PROFILES
from reproduce.networks.variants import LOSS_SETTINGS
from reproduce.options import data_name
from stepwise_lightning.plots import Panel, eigenvalues_figure

PAPER = (
    "Appendix: eigenvalues of the ResNet's hidden representation grow in steps at the same times as the eigenvalues of "
    "the embedding, although the loss does not depend on them."
)
HIDDEN = "encoder.backbone.covariance"
SHOWN = 16  # hidden eigenvalues in the figure
MIN_GROWTH = {"barlow_twins": 2.5, "vicreg": 4.0, "simclr": 1.6}
# Measured on photographs and CIFAR-10: 0.46 to 0.87 as means over three seeds, up to 1.2 for one seed; 1.5 or more for
# the reversed order.
# Against even spacing 0.68 to 1.00 for Barlow Twins, 0.74 to 1.10 for VICReg (photographs, ten seeds of the protocol).
RIVALS = {"times": ("common", "one common time", 0.95), "even": ("even", "evenly spaced times", 1.0)}
# In the smoke profile the hidden modes have grown little, and a control cannot be distinguished.
MIN_GROWTH_SMOKE = 1.1
TIMED = ("barlow_twins", "vicreg")  # losses whose hidden eigenvalues rise at the times of the steps


def produce(options: argparse.Namespace, directory: Path) -> Outcome:
    """Train missing runs, and compare the growth of both spectra."""
    runs = trained_runs(options)
    first = [run for run in runs if run.seed == options.seeds[0]]
    figure = eigenvalues_figure(
        [
            [run.panel() for run in first],
            [Panel(run.record, HIDDEN, step_times=run.steps.step_times, num_modes=SHOWN) for run in first],
        ],
        ["embedding", "hidden representation"],
        title="The hidden representation grows in the same steps as the embedding",
        note=f"ResNet on {data_name(options.data)}, seed {options.seeds[0]}",
        steps_label="detected step of the embedding",
    )
    summaries = [run.summary() | _growth(run) for run in runs]
    rows = (row for run in runs for row in run.rows({"hidden_eigenvalue": run.record.eigenvalues(HIDDEN)[:, :SHOWN]}))
    settings = {"lateness": {loss: _lateness([run for run in runs if run.loss == loss]) for loss in LOSS_SETTINGS}}
    return Outcome(figure, ROW_COLUMNS, rows, _claims(summaries, options), summaries, settings)


def _claims(summaries: list[dict[str, Any]], options: argparse.Namespace) -> list[Claim]:
    claims, smoke, seeds = [], options.profile == "smoke", options.seeds
    for loss, settings in LOSS_SETTINGS.items():
        if smoke and loss not in TIMED:
            continue
        of_loss = [summary for summary in summaries if summary["loss"] == loss]
        growth, unlearned = ([summary[key] for summary in of_loss] for key in ("relative_growth", "unlearned_growth"))
        sentence = f"{settings.title}: hidden growth of learned modes over hidden growth of other modes"
        least = MIN_GROWTH_SMOKE if smoke else MIN_GROWTH[loss]
        control = () if smoke else ("unlearned modes over the following modes", unlearned)
        claims.append(worst(f"{loss}_growth", sentence, growth, ">=", least, seeds, *control))
        if loss in TIMED and not smoke:
            for name, (key, rival, bound) in RIVALS.items():
                factors, reversed_factors = (
                    [summary[f"distance_{times}"] / summary[f"distance_{key}"] for summary in of_loss]
                    for times in ("steps", "reverse")
                )
                sentence = f"{settings.title}: distance of hidden rises from the steps over distance from {rival}"
                reverse = "steps in reverse order", reversed_factors, geometric_mean
                claims.append(average(f"{loss}_{name}", sentence, factors, "<=", bound, seeds, *reverse))
    return claims


def _rise_times(run: Run) -> tuple[list[float], list[float]]:
    """Return when hidden eigenvalues of learned modes rise, and the steps of the modes, as logarithms.

    The rise time is the last crossing of the geometric mean of the initial and final values. The first mode is left
    out: its hidden eigenvalue starts large.
    """
    hidden = _log_hidden(run)
    middle = (hidden[0] + np.median(hidden[-8:], axis=0)) / 2
    rises, steps = [], []
    for mode in range(1, int(run.steps.num_learned[-1])):
        below = np.nonzero(hidden[:, mode] < middle[mode])[0]
        step = float(run.steps.step_times[mode])
        if len(below) and np.isfinite(step):
            rises.append(float(run.record.times[below[-1]].log()))
            steps.append(float(np.log(step)))
    return rises, steps


def _log_hidden(run: Run) -> np.ndarray[Any, Any]:
    # Eigenvalues beyond the number of samples are zero.
    return np.log(run.record.eigenvalues(HIDDEN)[:, : 3 * int(run.steps.num_learned[-1])].numpy())


def _growth(run: Run) -> dict[str, float]:
    """Measure growth and rise times of the hidden eigenvalues of learned modes, without the first.

    Growth is the final over the initial value, as a geometric mean over modes, relative to the same number of unlearned
    modes. Distances of rise times are medians over modes, as factors.
    """
    hidden, learned = _log_hidden(run), int(run.steps.num_learned[-1])
    growth = np.median(hidden[-8:], axis=0) - hidden[0]
    others, after = growth[learned : 2 * learned - 1], growth[2 * learned - 1 : 3 * learned - 2]
    rises, steps = _rise_times(run)
    if not rises:
        far, near = ("distance_steps", "distance_reverse"), ("distance_common", "distance_even")
        growths = dict.fromkeys(("relative_growth", "unlearned_growth"), 0.0)
        return growths | dict.fromkeys(far, np.inf) | dict.fromkeys(near, 1.0)
    even = np.linspace(steps[0], steps[-1], len(steps))
    expected: dict[str, Any] = {"steps": steps, "reverse": steps[::-1], "common": np.median(steps), "even": even}
    return {
        "relative_growth": float(np.exp(growth[1:learned].mean() - others.mean())),
        "unlearned_growth": float(np.exp(others.mean() - after.mean())),
    } | {
        f"distance_{name}": float(np.exp(np.median(np.abs(np.subtract(rises, times)))))
        for name, times in expected.items()
    }


def _lateness(runs: list[Run]) -> dict[str, float]:
    """Return the correlation of the lateness of hidden rises and of steps, over the modes of all networks.

    Lateness is the deviation of the logarithm of the time from its linear regression on the number of the mode. In
    ``exchanged`` each network has the steps of another one: the mean over all cyclic exchanges of the networks.
    """
    times = [_rise_times(run) for run in runs]
    correlations = []
    for shift in range(len(times)):
        late: tuple[list[float], list[float]] = [], []
        for index, (rises, _) in enumerate(times):
            steps = times[index - shift][1]
            count = min(len(rises), len(steps))
            if count < 3:  # a line fits two times
                continue
            modes = np.arange(count)
            for values, part in zip(late, (rises[:count], steps[:count]), strict=True):
                values.extend(part - np.polyval(np.polyfit(modes, part, 1), modes))
        correlations.append(float(np.corrcoef(late[0], late[1])[0, 1]) if late[0] else float("nan"))
    others = correlations[1:]
    return {"own": correlations[0]} | ({"exchanged": float(np.mean(others))} if others else {})


FIGURE = PaperFigure("hidden_spectra", __doc__, PAPER, PROFILES, produce)
