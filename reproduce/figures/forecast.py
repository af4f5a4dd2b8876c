"""Forecasts of the step times before and during training, compared with measured steps (not in the paper).

Before training, ``stepwise forecast`` simulates the last layer on the features of the untrained network, for each run
of ``three_losses``. The first mode is accurate for all losses, later modes of Barlow Twins and SimCLR roughly. Later
modes of VICReg are not predicted: they are drawn faint, without a claim. As features change, networks learn more modes,
and some modes earlier, than with frozen features.

During training, the next mode is forecast from saved weights as in ``ForecastLogger``: on the probe pairs, for SimCLR
on 4096 training pairs. The velocity of the last layer is estimated from the previous saved weights. The baseline is a
line through the last twenty logarithms of the eigenvalue. For VICReg the remaining time is overestimated up to twofold,
and there is no claim.

With a schedule of 100 warm-up steps and a cosine until step 800, the first mode follows a simulation of the schedule.
With momentum, it does not follow the sum of learning rates.

Controls: pairs of views of different images; training without momentum; for Barlow Twins, which uses no momentum, the
growth rates of another loss; with a schedule, the sum of rates or a constant rate.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from reproduce.claims import Claim, seeds_text
from reproduce.figure import Outcome, PaperFigure
from reproduce.networks.runs import SMALL_INITIALIZATION, Run, trained_runs
from reproduce.networks.training import PROFILES
from reproduce.networks.variants import LOSS_SETTINGS
from reproduce.options import data_name
from reproduce.processes import map_parallel
from stepwise_lightning.forecasts.forecast import Forecast, correct_for_feature_learning
from stepwise_lightning.forecasts.sgd import SGDSettings, last_features, last_layer
from stepwise_lightning.forecasts.simulate import NUM_PAIRS, forecast_of_features, unseen_batches

PAPER = "Not in the paper: an application of its theory."
# Bounds of the median relative error of step times, before training.
MAX_FIRST_ERROR = {"barlow_twins": 0.06, "vicreg": 0.15, "simclr": 0.06}
# With a schedule SimCLR has 0.012 to 0.017 in four sets of three seeds; sums of rates have 0.033 to 0.1.
MAX_SCHEDULED_ERROR = MAX_FIRST_ERROR | {"simclr": 0.025}
MAX_LATER_ERROR = {"barlow_twins": 0.25, "simclr": 0.35}
# Times of live forecasts, as a fraction of the interval between two modes.
SHARES = (0.0, 0.5, 0.75)
MAX_LIVE_ERROR = {"barlow_twins": 0.3, "simclr": 0.3}
EXTRAPOLATED = 20  # measurements
TOLERANCE = 0.12  # maximum distance of saved weights from the requested time, as a fraction of the interval
LAST_MODE = 5  # later modes are 2 to 5
COLUMNS = ["loss", "seed", "forecast", "made at", "mode", "measured", "expected"]
_LABELS = {"start": "before training", "live": "during training", "line": "line through log λ"}


def produce(options: argparse.Namespace, directory: Path) -> Outcome:
    """Train missing runs, forecast every run, and compare."""
    runs = trained_runs(options, [*SMALL_INITIALIZATION, *((loss, "schedule") for loss in LOSS_SETTINGS)])
    rows = [row for part in map_parallel(forecast_run, [(run,) for run in runs], "forecast") for row in part]
    figure = _figure(rows, options)
    return Outcome(figure, COLUMNS, rows, _claims(rows, options), _summaries(rows, runs))


def forecast_run(run: Run) -> list[list[Any]]:
    """Return rows of ``COLUMNS`` with all forecasts for the measured modes of a run."""
    measured = _measured(run)
    if run.variant == "schedule":
        return _scheduled(run, measured[0])
    rows = []
    for name, forecast in {"start": run.forecast, **_controls(run)}.items():
        for mode, (step, expected) in enumerate(zip(measured, forecast.step_times.tolist(), strict=True)):
            if math.isfinite(step):
                rows.append([run.loss, run.seed, name, 0, mode + 1, step, expected])
    for mode in range(1, sum(map(math.isfinite, measured))):
        if not (math.isfinite(measured[mode - 1]) and math.isfinite(measured[mode])):
            continue
        for share in SHARES:
            gap = measured[mode] - measured[mode - 1]
            target = measured[mode - 1] + share * gap
            saved = min(run.saved_steps(), key=lambda step: abs(step - target), default=0)
            if abs(saved - target) < TOLERANCE * gap and saved < measured[mode]:
                for name, method in (("live", _live_forecast), ("line", _extrapolation)):
                    cells = [f"{name} {share:g}", saved, mode + 1, measured[mode], method(run, saved, mode)]
                    rows.append([run.loss, run.seed, *cells])
    return rows


def _measured(run: Run) -> list[float]:
    """Return the training steps at which modes were learned; effective time depends on the schedule."""
    times = np.interp(run.steps.step_times, run.record.times, run.record.steps, right=math.nan)
    return np.where(run.steps.step_times.isfinite(), times, math.nan).tolist()


def _scheduled(run: Run, measured: float) -> list[list[Any]]:
    """Return rows for the first mode with a schedule: forecast, sum of rates, and constant rate."""
    if not math.isfinite(measured):
        return []
    rates = SGDSettings.of(run.module, 0, int(run.record.steps[-1])).rates
    constant = run.forecast_of(*run.features, rates=rates.max().expand(len(rates))).step_times[0]
    summed = np.interp(constant * rates.max(), np.cumsum([0.0, *rates]), range(len(rates) + 1))
    expected: dict[str, Any] = {
        "schedule": run.forecast.step_times[0],
        "sum of rates": summed,
        "constant rate": constant,
    }
    return [[run.loss, run.seed, name, 0, 1, measured, float(step)] for name, step in expected.items()]


def _controls(run: Run) -> dict[str, Forecast]:
    h1, h2 = run.features
    controls = {}
    if run.loss in MAX_LATER_ERROR:
        controls["shuffled pairs"] = run.forecast_of(h1, h2.roll(1, 1))
    if run.optimization()[1]:
        return controls | {"no momentum": run.forecast_of(h1, h2, momentum=0.0)}
    other = "vicreg" if run.loss == "barlow_twins" else "barlow_twins"
    settings = SGDSettings.of(LOSS_SETTINGS[other].module(run.encoder(), 0.1), 0, 1).settings
    return controls | {"another loss": run.forecast_of(h1, h2, loss=other, settings=settings)}


def _live_forecast(run: Run, step: int, mode: int) -> float:
    """Return the forecast step time of ``mode`` (counted from 0) from the weights saved at ``step``."""
    module = run.module
    start = {name: value.clone() for name, value in module.state_dict().items()}
    layer, length = last_layer(module), int(run.record.steps[-1])
    before = max((saved for saved in run.saved_steps() if saved < step), default=0)
    try:
        earlier = _weights(run, before, start)
        module.load_state_dict(_weights(run, step, start))
        training = SGDSettings.of(module, step, length)
        batches = [run.data.probe_pairs()] if run.loss_settings.loss.uses_moments else unseen_batches(run.data)
        h1, h2 = last_features(module, layer, batches, NUM_PAIRS)
        elapsed_time = (step - before) * float(training.rates[0])
        names = {id(value): name for name, value in module.named_parameters()}
        bias = layer.bias
        parameters = [layer.weight] if bias is None else [layer.weight, bias]
        velocity = None
        if training.momentum:  # a step changes the weights by −ηv
            velocity = [(earlier[names[id(p)]].cpu() - p.detach().cpu()) / elapsed_time for p in parameters]
        forecast = forecast_of_features(training, h1, h2, layer.weight, bias, step, velocity, with_rates=False)
    finally:
        module.load_state_dict(start)
    learned_at = _measured(run)[mode - 1]
    return correct_for_feature_learning(
        run.loss, learned_at, step, float(forecast.step_times[mode].nan_to_num(nan=step))
    )


def _weights(run: Run, step: int, start: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"encoder.{k}": v for k, v in run.encoder(step=step).state_dict().items()} if step else start


def _extrapolation(run: Run, step: int, mode: int) -> float:
    """Return the step at which a line through the last logarithms of an eigenvalue reaches the threshold."""
    past = run.record.steps <= step
    steps = run.record.steps[past][-EXTRAPOLATED:].double()
    logs = run.eigenvalues()[past][-EXTRAPOLATED:, mode].clamp(min=1e-300).log()
    if len(steps) < 2:
        return math.inf
    slope = ((steps - steps.mean()) * (logs - logs.mean())).sum() / (steps - steps.mean()).square().sum()
    rest = math.log(run.steps.threshold) - float(logs[-1])
    return step + max(rest / float(slope), 0.0) if slope > 0 else math.inf


def _errors(rows: list[list[Any]], loss: str, name: str, modes: Sequence[int]) -> list[float]:
    """Return relative errors of the remaining steps; infinite for a mode without a forecast.

    The names ``live`` and ``line`` select all times of live forecasts.
    """
    chosen = [row for row in rows if row[0] == loss and name in (row[2], row[2].split()[0]) and row[4] in modes]
    return [abs(expected - measured) / (measured - made_at) for *_, made_at, _, measured, expected in chosen]


def _within(rows: list[list[Any]], loss: str, name: str, factor: float = 1.5) -> str:
    """Return the number of remaining times that are within a factor of the measured ones, as ``k of n``."""
    chosen = [row for row in rows if row[0] == loss and row[2].split()[0] == name]
    ratios = [(expected - made_at) / (measured - made_at) for *_, made_at, _, measured, expected in chosen]
    return f"{sum(1 / factor <= ratio <= factor for ratio in ratios)} of {len(ratios)}"


def _median(values: list[float]) -> float:
    ordered = sorted(math.inf if math.isnan(value) else value for value in values)
    return ordered[len(ordered) // 2] if ordered else math.nan


def _claims(rows: list[list[Any]], options: argparse.Namespace) -> list[Claim]:
    claims = []
    later, every = range(2, LAST_MODE + 1), range(1, 1000)
    for loss, settings in LOSS_SETTINGS.items():

        def median(name: str, modes: Sequence[int], loss: str = loss) -> float:
            return _median(_errors(rows, loss, name, modes))

        title, seeds = settings.title, seeds_text(options.seeds)
        control = "no momentum" if any(row[:3] == [loss, row[1], "no momentum"] for row in rows) else "another loss"
        claims.append(Claim(
            f"{loss}_first", f"{title}: error of the first mode's step, before training, median over {seeds}",
            median("start", [1]), "<=", MAX_FIRST_ERROR[loss], control, median(control, [1]),
        ))  # fmt: skip
        # Without momentum the sum of rates is correct too.
        other = "sum of rates" if control == "no momentum" else "constant rate"
        claims.append(Claim(
            f"{loss}_schedule", f"{title}: error of the first mode's step with warm-up and cosine, median over {seeds}",
            median("schedule", [1]), "<=", MAX_SCHEDULED_ERROR[loss], other, median(other, [1]),
        ))  # fmt: skip
        if loss in MAX_LATER_ERROR:
            claims.append(Claim(
                f"{loss}_later", f"{title}: error of the steps of modes 2 to {LAST_MODE}, median over {seeds}",
                median("start", later), "<=", MAX_LATER_ERROR[loss], "shuffled pairs", median("shuffled pairs", later),
            ))  # fmt: skip
        if loss in MAX_LIVE_ERROR:
            claims.append(Claim(
                f"{loss}_live", f"{title}: error of the remaining time, during training, median over {seeds}",
                median("live", every), "<=", MAX_LIVE_ERROR[loss], "line through log λ", median("line", every),
            ))  # fmt: skip
    return claims


def _summaries(rows: list[list[Any]], runs: list[Run]) -> list[dict[str, Any]]:
    table = []
    for loss in dict.fromkeys(run.loss for run in runs):
        columns = {
            "mode 1": ("start", [1]), "scheduled": ("schedule", [1]), "mode 2": ("start", [2]),
            "mode 3": ("start", [3]), "modes 4-5": ("start", [4, 5]), "modes 2-5": ("start", range(2, 6)),
        }  # fmt: skip
        entry: dict[str, Any] = {"loss": loss} | {k: _median(_errors(rows, loss, *v)) for k, v in columns.items()}
        for share in SHARES:
            for name in ("live", "line"):
                entry[f"{name} {share:g}"] = _median(_errors(rows, loss, f"{name} {share:g}", range(1, 1000)))
        table.append(entry | {f"{name} within 1.5": _within(rows, loss, name) for name in ("live", "line")})
    return table


def _figure(rows: list[list[Any]], options: argparse.Namespace) -> Figure:
    """Plot forecast against measured steps, and errors of live forecasts against the remaining time."""
    figure = Figure(figsize=(12, 7.4), layout="constrained")
    axes: Any = figure.subplots(2, len(LOSS_SETTINGS))
    for column, (loss, settings) in enumerate(LOSS_SETTINGS.items()):
        upper, lower = axes[0, column], axes[1, column]
        loss_rows = [row for row in rows if row[0] == loss]
        predicted_modes = math.inf if loss in MAX_LATER_ERROR else 1
        for _, seed, name, _, mode, measured, expected in loss_rows:
            if name == "start" and math.isfinite(expected):
                alpha = 0.9 if mode <= predicted_modes else 0.3
                upper.plot(measured, expected, "os^"[seed % 3], color=f"C{min(mode - 1, 9)}", alpha=alpha, markersize=6)
        steps = [row[5] for row in loss_rows if row[2] == "start"] or [1.0, 10.0]
        ends = [0.8 * min(steps), 1.25 * max(steps)]
        upper.plot(ends, ends, color="0.4", linewidth=1)
        upper.fill_between(ends, [e / 1.3 for e in ends], [e * 1.3 for e in ends], color="0.5", alpha=0.15, linewidth=0)
        upper.set(xscale="log", yscale="log", xlabel="measured step", title=settings.title)
        for name, marker, colour in (("live", "o", "C0"), ("line", "x", "0.6")):
            chosen = [row for row in loss_rows if row[2].startswith(name) and math.isfinite(row[6])]
            remaining = [row[5] - row[3] for row in chosen]
            # Clip to the plotted range: a slope near zero extrapolates to infinity.
            ratios = [min(max((row[6] - row[3]) / (row[5] - row[3]), 0.2), 5.0) for row in chosen]
            lower.plot(remaining, ratios, marker, color=colour, markersize=5, label=_LABELS[name])
        lower.axhline(1, color="0.4", linewidth=1)
        lower.set(xscale="log", yscale="log", xlabel="steps until the next mode", ylim=(0.18, 5.5), xlim=(1, ends[1]))
        lower.minorticks_off()
        lower.set_yticks(ticks := [0.2, 0.5, 1, 2, 5], [f"{tick:g}" for tick in ticks])
    axes[0, 0].set_ylabel("expected step, before training")
    axes[1, 0].set_ylabel("expected / measured remaining steps")
    axes[1, 0].legend(frameon=False)
    figure.suptitle("Step times can be forecast before and during training")
    figure.supxlabel(
        f"ResNet on {data_name(options.data)}, {seeds_text(options.seeds)}; colours: modes; markers: seeds; "
        "band: 30 %; faint: no claim", fontsize="small", color="0.3",
    )  # fmt: skip
    return figure


FIGURE = PaperFigure("forecast", __doc__, PAPER, PROFILES, produce)
