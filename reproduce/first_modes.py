"""Forecast and measure the first mode of losses given as functions: ``python -m reproduce.first_modes``.

A small ResNet is trained from a small start with plain SGD and ``JointEmbedding(loss=…)``, for 1.75 times the
forecast step of the first mode; a run takes about 20 s of CPU time. Both steps are the crossing of a tenth of the
largest eigenvalue at the end. Losses that are not centred learn the mean embedding first, which has an eigenvalue in C.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
from torch import Tensor

from reproduce.losses import dcl_loss, lejepa_loss
from stepwise_lightning import Encoder, JointEmbedding, SpectrumLogger, TwoViewDataModule, spectral_contrastive_loss
from stepwise_lightning.forecasts.forecast import Forecast
from stepwise_lightning.forecasts.sgd import SGDSettings, last_features, last_layer
from stepwise_lightning.forecasts.simulate import NUM_PAIRS, forecast_of_features, unseen_batches


class Setting(NamedTuple):
    """Loss and settings of its runs."""

    loss: Callable[[Tensor, Tensor], Tensor]
    learning_rate: float
    matrix: str
    bias_norm: float | None = None


SETTINGS = {
    "spectral_contrastive": Setting(spectral_contrastive_loss, 0.001, "cross_correlation"),
    "dcl": Setting(dcl_loss, 0.0015, "tangent_covariance", bias_norm=1.0),
    "lejepa": Setting(
        partial(lejepa_loss, sigreg_weight=0.3, num_directions=256), 0.0004, "cross_correlation"
    ),
}  # fmt: skip
COLUMNS = ["loss", "data", "seed", "learning_rate", "drive", "forecast", "measured", "error"]
LENGTH = 1.75  # steps of training, as a multiple of the forecast
_MOST_STEPS, _POINTS = 600, 40


def main(arguments: list[str] | None = None) -> None:
    """Measure the named losses for the seeds, and write one row per run."""
    parser = argparse.ArgumentParser("python -m reproduce.first_modes", description=__doc__)
    parser.add_argument("losses", nargs="*", default=[], choices=[*SETTINGS, []], metavar="LOSS", help="default: all")
    parser.add_argument("--data", default="photos", help="photos, cifar10, stl10 or a folder of images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("first_modes.csv"), help="table, to which rows are added")
    options = parser.parse_args(arguments)
    for name in options.losses or SETTINGS:
        rows = []
        for seed in options.seeds:
            rows.append(measure_run(name, options.data, seed))
            print(*(f"{cell:.4g}" if isinstance(cell, float) else cell for cell in rows[-1]), flush=True)
            _append(options.out, rows[-1])
        median = statistics.median(abs(row[-1]) for row in rows)
        print(f"{name} on {options.data}: median error of the first mode's step {median:.1%}", flush=True)


def measure_run(name: str, data: str, seed: int) -> list[Any]:
    """Return a row of ``COLUMNS``."""
    setting = SETTINGS[name]
    L.seed_everything(seed, verbose=False)
    encoder = Encoder(
        out_features=10, backbone="resnet_small", projector_depth=2, hidden_features=128, alpha=0.001,
        bias_norm=setting.bias_norm,
    )  # fmt: skip
    module = JointEmbedding(encoder, setting.learning_rate, loss=setting.loss, driven_matrix=setting.matrix)
    images = TwoViewDataModule(data=data, augmentation="weak", image_size=24, global_batch_size=64, seed=seed)
    images.setup("fit")
    forecast = _forecast(module, images)
    step = float(forecast.step_times[0])
    if not step < _MOST_STEPS:
        raise SystemExit(f"{name}, seed {seed}: no first mode within {_MOST_STEPS} steps; raise the learning rate")
    spectra = SpectrumLogger(matrices=[setting.matrix], num_points=_POINTS)
    trainer = L.Trainer(
        max_steps=forecast.max_steps, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[spectra],
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=images)
    measured = float(spectra.record.detect_steps(setting.matrix).step_times[0]) / setting.learning_rate
    drive = setting.learning_rate * float(forecast.growth_rates[0])
    return [name, data, seed, setting.learning_rate, drive, step, measured, step / measured - 1]


def _forecast(module: JointEmbedding, images: TwoViewDataModule) -> Forecast:
    """Return a forecast of training for ``LENGTH`` times the step of the first mode."""
    layer = last_layer(module)
    h1, h2 = last_features(module, layer, unseen_batches(images), NUM_PAIRS)
    sgd = SGDSettings.of(module, 0, _MOST_STEPS)
    for _ in range(2):
        forecast = forecast_of_features(sgd, h1, h2, layer.weight, layer.bias, with_rates=False)
        steps = min(float(forecast.step_times[0]) * LENGTH, _MOST_STEPS)
        sgd = replace(sgd, rates=sgd.rates[: math.ceil(steps)])
    return forecast


def _append(path: Path, row: list[Any]) -> None:
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, row] if is_new else [row])


if __name__ == "__main__":
    main()
