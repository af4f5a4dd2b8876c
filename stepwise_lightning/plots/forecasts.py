"""Figure of a forecast."""

from __future__ import annotations

from typing import Any

import torch

from stepwise_lightning.forecasts.forecast import Forecast
from stepwise_lightning.plots.panels import Figure, mode_colours
from stepwise_lightning.spectrum.matrices import phrase


def forecast_figure(forecast: Forecast) -> Figure:
    """Draw the forecast eigenvalues against optimiser steps, with dotted step times.

    Modes with a known typical error are solid, with their error shaded; the others are faint.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis: Any = figure.subplots()
    colours = mode_colours(forecast.eigenvalues.shape[1])
    steps = forecast.steps.clamp(min=1) if not forecast.start else forecast.steps
    values = forecast.eigenvalues.masked_fill(~forecast.eigenvalues.isfinite(), torch.nan)
    for mode, (step, error) in enumerate(zip(forecast.step_times.tolist(), forecast.errors.tolist(), strict=True)):
        known = error == error
        axis.plot(steps, values[:, mode], color=colours[mode], linewidth=2, alpha=1.0 if known else 0.3)
        if forecast.start < step <= forecast.max_steps:
            axis.axvline(step, color=colours[mode], linestyle=":", linewidth=0.9)
            if known:
                reach = error * (step - forecast.start)
                axis.axvspan(step - reach, step + reach, color=colours[mode], alpha=0.12, linewidth=0)
    if forecast.threshold > 0:
        axis.axhline(forecast.threshold, color="0.6", linewidth=0.8)
    axis.set_xscale("linear" if forecast.start else "log")
    axis.set_yscale("log", nonpositive="mask")
    top = float(values.nan_to_num(0).max())
    if top > 0:
        axis.set_ylim(1e-6 * top, 3 * top)
    axis.set_xlim(max(float(steps[0]), 1), forecast.max_steps)
    axis.set_xlabel("optimiser step")
    axis.set_ylabel(f"eigenvalues of {phrase(forecast.matrix)}")
    axis.set_title(f"Forecast from step {forecast.start}: dotted, when each mode is learned")
    axis.spines[["top", "right"]].set_visible(False)
    return figure
