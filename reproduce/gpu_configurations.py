"""Forecast the training runs of the GPU configurations on a CPU: ``python -m reproduce.gpu_configurations``.

Each forecast uses the configuration's untrained network on a few batches of images, and becomes one row of the table in
``--out``. ``--data`` replaces a missing data set by a folder of other images, which are resized. A batch of 256 pairs
takes a ResNet-50 about half a minute on one core.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from reproduce.networks.training import CONFIGS
from reproduce.networks.variants import LOSS_SETTINGS
from stepwise_lightning import Encoder, TwoViewDataModule
from stepwise_lightning.files import atomic_write_text
from stepwise_lightning.forecasts.forecast import Forecast
from stepwise_lightning.forecasts.simulate import forecast, unseen_batches

COLUMNS = (
    "configuration", "learning rate", "diverges above", "safe below", "suggested", "mode 1", "mode 2", "mode 3",
    "modes within max_steps", "pairs",
)  # fmt: skip
NAMES = [f"{loss}_{data}" for data in ("cifar10", "stl10", "imagenet") for loss in LOSS_SETTINGS]


def main(arguments: list[str] | None = None) -> None:
    """Forecast the named configurations, all by default, and write the table."""
    parser = argparse.ArgumentParser("python -m reproduce.gpu_configurations", description=__doc__)
    parser.add_argument("names", nargs="*", default=[], choices=[*NAMES, []], metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--data", help="folder of images that replaces the data set of the configurations")
    parser.add_argument("--batches", type=int, default=8, help="number of batches (default: 8)")
    parser.add_argument("--batch-size", type=int, default=512, help="pairs per batch (default: 512)")
    parser.add_argument("--out", type=Path, default=Path("gpu_configurations.md"), help="output file with the table")
    options = parser.parse_args(arguments)
    command = f"python -m reproduce.gpu_configurations {' '.join(sys.argv[1:] if arguments is None else arguments)}"
    rows: list[list[str]] = []
    for name in options.names or NAMES:
        start = time.process_time()
        result = forecast_configuration(name, options.data, options.batches, options.batch_size)
        print(f"{name}, {time.process_time() - start:.0f} s of CPU time\n{result}\n", flush=True)
        rows.append(_row(name, result))
        table = ["| " + " | ".join(row) + " |" for row in (COLUMNS, ["---"] * len(COLUMNS), *rows)]
        atomic_write_text(options.out, "\n".join([f"`{command.strip()}`", "", *table]) + "\n")


def forecast_configuration(name: str, data: str | None, batches: int, batch_size: int) -> Forecast:
    """Return the forecast of ``configs/<name>.yaml`` from batches of its data set, or of the images in ``data``."""
    config: dict[str, Any] = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    torch.manual_seed(config["seed_everything"])
    settings = config["model"]["init_args"]
    encoder = Encoder(**settings.pop("encoder")["init_args"])
    module = LOSS_SETTINGS[name.rsplit("_", 1)[0]].module(encoder, **settings)
    data_settings = config["data"]["init_args"] | {"global_batch_size": batch_size, "num_workers": 0}
    images = TwoViewDataModule(**(data_settings | ({"data": data} if data else {})))
    images.setup("fit")
    if torch.cuda.is_available():
        module.cuda()
    return forecast(module, unseen_batches(images), config["trainer"]["max_steps"], num_pairs=batches * batch_size)


def _row(name: str, result: Forecast) -> list[str]:
    steps = [f"{step:.0f}" if step < result.max_steps else "–" for step in result.step_times[:3].tolist()]
    rates = [f"{rate:.2g}" for rate in (result.learning_rate, *result.rates)]
    return [name, *rates, *steps, str(int(result.step_times.isfinite().sum())), str(result.num_pairs)]


if __name__ == "__main__":
    main()
