"""``stepwise forecast``: a table and a picture of when each mode will be learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch

from stepwise_lightning.callbacks.spectrum_logger import recorded
from stepwise_lightning.encoders import bias_of
from stepwise_lightning.errors import NotFoundError, UserError, reason
from stepwise_lightning.files import atomic_write
from stepwise_lightning.forecasts.forecast import Forecast
from stepwise_lightning.forecasts.sgd import last_layer
from stepwise_lightning.forecasts.simulate import NUM_PAIRS, forecast, unseen_batches
from stepwise_lightning.modules import BarlowTwins, SimCLR, VICReg

__all__ = ["ForecastingTrainer", "as_little_as_a_forecast_needs"]


class ForecastingTrainer(L.Trainer):
    """Lightning's Trainer, which can also say beforehand what training will come to."""

    def forecast(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        pairs: int = NUM_PAIRS,
        picture: str = "forecast.png",
    ) -> Forecast:
        """Say when each mode will be learned, and up to which learning rate training is stable; nothing is trained.

        Args:
            model: one of this package's.
            datamodule: its data.
            ckpt_path: forecast from this checkpoint, or from the newest run's (last), instead of from the beginning.
            pairs: how many pairs of views to measure features on; at least eight times as many as there are features.
            picture: where to draw it.

        """
        if not isinstance(model, (BarlowTwins, VICReg, SimCLR)):
            raise UserError(
                f"a forecast understands BarlowTwins, VICReg and SimCLR, not {type(model).__name__}: for another "
                "module that ends in a linear layer call stepwise_lightning.forecast from Python, and tell it the loss"
            )
        if datamodule is None:
            raise UserError("data is missing: a forecast needs --data")
        max_steps = self.max_steps if self.max_steps > 0 else None
        if max_steps is None:
            raise UserError("a forecast needs to know when training ends: set trainer.max_steps")
        checkpoint = _read(ckpt_path, model) if ckpt_path else {}
        start = checkpoint.get("global_step", 0)
        if start >= max_steps:
            raise UserError(f"the checkpoint is of step {start}, where training ends ({max_steps}): raise max_steps")
        datamodule.prepare_data()
        datamodule.setup("fit")
        model.to(self.strategy.root_device)
        result = forecast(
            model, unseen_batches(datamodule), max_steps, start=start, num_pairs=pairs,
            velocity=_velocity(model, checkpoint),
        )  # fmt: skip
        if records := [record for record in recorded(checkpoint) if result.matrix in record.matrices]:
            result = result.with_plateau_correction(records[0])
        print(result)
        if start and result.next_mode[1] < max_steps:
            print("mode {} is due at step {:.0f}".format(*result.next_mode))
        from stepwise_lightning.plots.forecasts import forecast_figure

        figure = forecast_figure(result)
        atomic_write(Path(picture), lambda path: figure.savefig(path, format="png", dpi=150))
        print(f"picture: {picture}")
        return result


def as_little_as_a_forecast_needs(config: Any) -> None:
    """Let a configuration for GPUs be forecast on whatever there is, without loggers, callbacks and other processes."""
    trainer = config.trainer
    trainer.accelerator, trainer.devices, trainer.num_nodes, trainer.strategy = "auto", 1, 1, "auto"
    trainer.logger, trainer.callbacks, trainer.plugins, trainer.sync_batchnorm = False, None, None, False
    trainer.enable_checkpointing = False


def _read(path: str, model: L.LightningModule) -> dict[str, Any]:
    """Return a checkpoint, whose weights the model gets."""
    if not Path(path).is_file():
        raise NotFoundError(f"checkpoint file not found: {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(checkpoint["state_dict"])
    except Exception as error:  # whatever torch and pickle make of foreign bytes
        raise UserError(f"{path} is no checkpoint of this model ({reason(error)}): give another") from error
    return checkpoint


def _velocity(model: L.LightningModule, checkpoint: dict[str, Any]) -> list[torch.Tensor] | None:
    """Return the momentum buffers of the last layer in a checkpoint, None where there are none."""
    states = [state["state"] for state in checkpoint.get("optimizer_states", [])[:1]]
    layer = last_layer(model)
    wanted = [layer.weight, bias_of(layer)]
    indices = [index for w in wanted for index, p in enumerate(model.parameters()) if p is w]
    buffers = [state.get(index, {}).get("momentum_buffer") for state in states for index in indices]
    return buffers if buffers and all(buffer is not None for buffer in buffers) else None
