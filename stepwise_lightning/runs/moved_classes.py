"""Class paths of earlier versions in configurations, and their present paths."""

from __future__ import annotations

import re

from lightning.pytorch.utilities import rank_zero_info

# module of a class before -> now; classes exported by stepwise_lightning have kept their paths
_MOVED = {
    "stepwise_lightning.acceleration": "stepwise_lightning.modules.acceleration",
    "stepwise_lightning.callbacks": "stepwise_lightning.callbacks.spectrum_logger",
    "stepwise_lightning.checkpoints": "stepwise_lightning.runs",
    "stepwise_lightning.collectives": "stepwise_lightning.sync_batchnorm",
    "stepwise_lightning.data.fixed_pairs": "stepwise_lightning.data.fixed_crop_pairs",
    "stepwise_lightning.data.modules": "stepwise_lightning.data.two_view_datamodule",
    "stepwise_lightning.evaluation": "stepwise_lightning.callbacks.online_evaluation",
    "stepwise_lightning.forecasts": "stepwise_lightning.callbacks.forecast_logger",
    "stepwise_lightning.forecasts.logger": "stepwise_lightning.callbacks.forecast_logger",
    "stepwise_lightning.joint_embedding": "stepwise_lightning.modules",
    "stepwise_lightning.spectrum.collapse": "stepwise_lightning.callbacks.collapse_monitor",
    "stepwise_lightning.spectrum.logger": "stepwise_lightning.callbacks.spectrum_logger",
}
_CLASS = re.compile(rf"(?<![\w.])({'|'.join(map(re.escape, _MOVED))})\.([A-Z]\w*)")


def with_current_classes(text: str) -> str:
    """Return a configuration or an option with the present paths of classes that moved; log each one in a line."""
    for module, name in dict.fromkeys(_CLASS.findall(text)):
        rank_zero_info(f"{module}.{name} has moved: write {_MOVED[module]}.{name}")
    return _CLASS.sub(lambda match: f"{_MOVED[match[1]]}.{match[2]}", text)
