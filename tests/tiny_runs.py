"""Runs of the command line that take a fraction of a second: a linear model on twenty images of 4×4 pixels."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from tiny_sets import noise

from stepwise_lightning.__main__ import main

CONFIG: dict[str, Any] = {
    "model": {
        "class_path": "stepwise_lightning.BarlowTwins",
        "init_args": {
            "encoder": {
                "class_path": "stepwise_lightning.LinearEncoder",
                "init_args": {"in_features": 48, "out_features": 3, "init_std": 1e-3},
            },
            "learning_rate": 1e-3,
        },
    },
    "data": {
        "class_path": "stepwise_lightning.TwoViewDataModule",
        "init_args": {"data": "images", "augmentation": "weak", "global_batch_size": 4, "num_probe_pairs": 2},
    },
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 2,
        "log_every_n_steps": 1,
        "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs"}},
        "callbacks": [{"class_path": "stepwise_lightning.SpectrumLogger"}],
        "enable_progress_bar": False,
        "enable_model_summary": False,
    },
}


def write_images(folder: Path, count: int = 20) -> None:
    """Write ``count`` images in two classes."""
    for number in range(count):
        path = folder / "images" / f"class_{number % 2}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(4, 4, 3, seed=number)).save(path)


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of CONFIG with new values at dotted paths, such as ``model.init_args.learning_rate``."""
    config = copy.deepcopy(CONFIG)
    for path, value in changes.items():
        *above, last = path.split(".")
        place = config
        for part in above:
            place = place[int(part) if isinstance(place, list) else part]
        place[last] = value
    return config


def stepwise(*arguments: object, config: dict[str, Any] = CONFIG) -> None:
    """Run ``stepwise`` in this process, with the configuration written to the working directory."""
    Path("mine.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    command, *options = map(str, arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["stepwise", command, "--config=mine.yaml", *options])
        main()


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object, config: dict[str, Any] = CONFIG) -> str:
    """Run a command that must fail, and return its error message of one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        stepwise(*arguments, config=config)
    # Python prints the text of SystemExit at exit; the parser prints its own messages.
    text = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    (line,) = text.strip().splitlines()
    assert line.startswith("stepwise") and ": error: " in line
    return line
