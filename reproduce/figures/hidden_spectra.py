"""Hidden eigenvalues rise in the order in which the embedding learns its modes (appendix of the paper).

The losses depend on the embedding only. The figure compares its eigenvalues with the eigenvalues of the representation
before the projector, on the same held-out pairs, for the runs of ``three_losses``. The hidden eigenvalues are large at
initialisation and do not grow by many orders of magnitude. When the embedding learns its k-th mode, the k-th hidden
eigenvalue rises too; the hidden eigenvalues of other modes do not.

With Barlow Twins and VICReg the k-th hidden eigenvalue grows while the embedding learns its k-th mode, within 25 % of
the time of the step, and hardly at the steps of other modes. The table gives its growth at evenly spaced times too, and
``claims.json`` at the steps of the other seeds: rivals that share order and range with the steps, and on CIFAR-10 do as
well. With SimCLR growth at the steps is small, and there is no claim. Each hidden eigenvalue also rises closer to its
own step than to a common time of all steps.
"""

from __future__ import annotations

import argparse
from itertools import permutations
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
MAX_TIME_FACTOR = 0.95
# Photographs, ten seeds of the protocol: at least 1.9 and 1.6, at the steps of other modes at most 1.21.
MIN_GROWTH_AT_STEPS = {"barlow_twins": 1.6, "vicreg": 1.4}
WINDOW = np.log(1.25)  # on both sides of a step
# In the smoke profile the hidden modes have grown little, and a control cannot be distinguished.
MIN_GROWTH_SMOKE = 1.1
TIMED = tuple(MIN_GROWTH_AT_STEPS)  # losses whose hidden eigenvalues rise at the times of the steps


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
        title="Hidden eigenvalues rise in the order in which the embedding learns its modes",
        note=f"ResNet on {data_name(options.data)}, seed {options.seeds[0]}",
        steps_label="detected step of the embedding",
    )
    summaries = [run.summary() | _growth(run) for run in runs]
    rows = (row for run in runs for row in run.rows({"hidden_eigenvalue": run.record.eigenvalues(HIDDEN)[:, :SHOWN]}))
    others = {loss: _growth_at_other_seeds([run for run in runs if run.loss == loss]) for loss in LOSS_SETTINGS}
    settings = {"growth_at_steps_of_other_seeds": others}
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
            claims += [_at_steps(loss, of_loss, seeds), _times(loss, of_loss, seeds)]
    return claims


def _at_steps(loss: str, summaries: list[dict[str, Any]], seeds: list[int]) -> Claim:
    own, other = ([summary[f"growth_at_{key}"] for summary in summaries] for key in ("steps", "other_steps"))
    sentence = f"{LOSS_SETTINGS[loss].title}: growth of the k-th hidden eigenvalue within 25 % of the k-th step"
    control = "at the steps of other modes", other
    return worst(f"{loss}_at_steps", sentence, own, ">=", MIN_GROWTH_AT_STEPS[loss], seeds, *control)


def _times(loss: str, summaries: list[dict[str, Any]], seeds: list[int]) -> Claim:
    factors, reverse = ([summary[key] for summary in summaries] for key in ("time_factor", "reversed_time_factor"))
    title = LOSS_SETTINGS[loss].title
    sentence = f"{title}: distance of hidden rises from the steps over distance from one common time"
    control = "steps in reverse order", reverse, geometric_mean
    return average(f"{loss}_times", sentence, factors, "<=", MAX_TIME_FACTOR, seeds, *control)


def _log_hidden(run: Run) -> np.ndarray[Any, Any]:
    """Return logarithms of the hidden eigenvalues, three times as many as learned modes, (T, k)."""
    # Eigenvalues beyond the number of samples are zero.
    return np.log(run.record.eigenvalues(HIDDEN)[:, : 3 * int(run.steps.num_learned[-1])].numpy())


def _growth(run: Run) -> dict[str, float]:
    """Measure growth and rise times of the hidden eigenvalues of learned modes, without the first, which starts large.

    Growth is the final over the initial value, as a geometric mean over modes, relative to the same number of unlearned
    modes. The rise time is the last crossing of the geometric mean of both values.
    """
    hidden, times, learned = _log_hidden(run), run.record.times.numpy(), int(run.steps.num_learned[-1])
    start, end = hidden[0], np.median(hidden[-8:], axis=0)
    growth = end - start
    others, after = growth[learned : 2 * learned - 1], growth[2 * learned - 1 : 3 * learned - 2]
    rises, expected = [], []
    for mode in range(1, learned):
        below = np.nonzero(hidden[:, mode] < (start + end)[mode] / 2)[0]
        step = float(run.steps.step_times[mode])
        if len(below) and np.isfinite(step):
            rises.append(np.log(times[below[-1]]))
            expected.append(np.log(step))
    if not rises:
        growths = ("relative_growth", "unlearned_growth", "growth_at_steps", "growth_at_other_steps", "growth_evenly")
        return dict.fromkeys(growths, 0.0) | dict.fromkeys(("time_factor", "reversed_time_factor"), float("inf"))
    distance, reversed_distance, common_distance = (
        np.median(np.abs(np.subtract(rises, times))) for times in (expected, expected[::-1], np.median(expected))
    )
    return {
        "relative_growth": float(np.exp(growth[1:learned].mean() - others.mean())),
        "unlearned_growth": float(np.exp(others.mean() - after.mean())),
        "time_factor": float(np.exp(distance - common_distance)),
        "reversed_time_factor": float(np.exp(reversed_distance - common_distance)),
    } | _growth_at_steps(run)


def _growth_at_steps(run: Run) -> dict[str, float]:
    """Measure the growth of the hidden eigenvalues of learned modes, without the first, at steps and at other times."""
    steps = _step_times(run)
    others = [(k, other) for k, time in steps for _, other in steps if abs(np.log(other / time)) > 2 * WINDOW]
    times = [time for _, time in steps]
    even = [(k, time) for (k, _), time in zip(steps, np.linspace(times[0], times[-1], len(times)), strict=True)]
    return {
        "growth_at_steps": _growth_around(run, steps),
        "growth_at_other_steps": _growth_around(run, others),
        "growth_evenly": _growth_around(run, even),
    }


def _step_times(run: Run) -> list[tuple[int, float]]:
    """Return learned modes, without the first, and their step times."""
    times = run.steps.step_times[: int(run.steps.num_learned[-1])]
    return [(k, float(time)) for k, time in enumerate(times) if k and time.isfinite()]


def _growth_around(run: Run, centres: list[tuple[int, float]]) -> float:
    """Return the geometric mean of the growth of hidden eigenvalues k around times, for pairs of k and time."""
    if not centres:
        return float("nan")
    hidden, times = _log_hidden(run)[1:], run.record.times.log().numpy()[1:]
    growth = [
        np.interp(np.log(time) + WINDOW, times, hidden[:, k]) - np.interp(np.log(time) - WINDOW, times, hidden[:, k])
        for k, time in centres
    ]
    return float(np.exp(np.mean(growth)))


def _growth_at_other_seeds(runs: list[Run]) -> float | None:
    """Return the mean growth of the runs' hidden eigenvalues at the steps of the other seeds, None for one seed."""
    growth = []
    for run, other in permutations(runs, 2):
        learned = {k for k, _ in _step_times(run)}
        growth.append(_growth_around(run, [(k, time) for k, time in _step_times(other) if k in learned]))
    return float(np.exp(np.nanmean(np.log(growth)))) if growth else None


FIGURE = PaperFigure("hidden_spectra", __doc__, PAPER, PROFILES, produce)
